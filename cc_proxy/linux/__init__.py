"""Linux interfaces that the standard library lacks, or covers only in part."""
