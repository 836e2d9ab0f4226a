"""The daemon as a process, over raw sockets: none of the project's own protocol code takes part."""
