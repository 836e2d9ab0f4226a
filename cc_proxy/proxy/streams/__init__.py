"""The streams of one VM: a thread that copies frames between the I/O channel and clients' fds."""
