"""Logging: levels, writing and limiting lines, unexpected errors, stacks of threads."""
