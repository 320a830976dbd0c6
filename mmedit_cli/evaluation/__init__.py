"""Scores and the protocols they are measured under."""
