"""Judges and distances for edited pictures."""
