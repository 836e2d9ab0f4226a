"""Interfaces of Linux that the standard library lacks, or has only in part."""
