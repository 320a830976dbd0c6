"""Data sets; each becomes a list of EditCase; one data set a file."""
