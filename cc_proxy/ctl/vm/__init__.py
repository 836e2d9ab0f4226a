"""VMs that cc-proxyctl starts under QEMU, with a guest whose first process is the agent."""
