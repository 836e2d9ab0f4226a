"""What holds for any input, looked for with hypothesis."""
