"""Tests of the endurance test's own logic."""
