"""Virtual machines that cc-proxyctl starts: QEMU, with a guest whose first process is the agent."""
