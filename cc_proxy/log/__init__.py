"""Logging: levels, how lines are written and limited, and what is logged of errors and threads."""
