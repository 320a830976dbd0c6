"""Data sets: each becomes a list of EditCase; a data set a file."""
