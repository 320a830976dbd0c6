"""Editors: ways to change what a model answers; a method a file, the file name is the public name."""
