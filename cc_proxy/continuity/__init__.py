"""From one process of the daemon to the next: where fds and state are kept meanwhile, and in what format."""
