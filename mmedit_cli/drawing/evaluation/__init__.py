"""Scores of pictures and of drawn concepts."""
