"""cc-proxy's benchmark: `python -m bench`. README.md, beside this file, says how to read the results."""
