"""Subjects to learn and to draw."""
