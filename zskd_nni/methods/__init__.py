"""The published methods, one file a paper."""
