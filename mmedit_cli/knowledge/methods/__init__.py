"""Editors; the name of a file or folder is the public name of the method."""
