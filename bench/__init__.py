"""cc-proxy's benchmark: `python -m bench`. How to read what it prints is in README.md beside this file."""
