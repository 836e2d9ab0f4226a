"""What the daemon needs of Linux beyond the standard library."""
