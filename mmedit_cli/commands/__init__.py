"""The commands that are the same for every method, one file each; those by kind of method are in `kinds/`."""
