"""Coverage-guided fuzzing: `make fuzz`. Inputs worth keeping are in corpus/, a directory for each target."""
