"""GRACE: a codebook of answers at one layer; a question near a stored one gets its value, any other is left alone."""

from mmedit_cli.knowledge.methods.grace.editor import EDITOR

__all__ = ["EDITOR"]
