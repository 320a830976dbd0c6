"""The commands, one file each: what they take; what they do lies in the modules they import when called."""
