"""The VMs: which there are, the life of each, and its control channel."""
