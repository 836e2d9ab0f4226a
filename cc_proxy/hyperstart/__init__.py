"""hyperstart's two channels as bytes: codes and codecs. Nothing here does any I/O."""
