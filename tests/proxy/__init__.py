"""The daemon's modules from inside, on socket pairs; tests/wire has the daemon from outside."""
