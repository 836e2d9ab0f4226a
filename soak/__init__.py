"""cc-proxy's endurance test: `python -m soak`. docs/reliability.md says how to read the results."""
