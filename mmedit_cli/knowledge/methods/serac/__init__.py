"""SERAC: a classifier finds the edit that a question is about, and a small model answers; no weight changes."""

from mmedit_cli.knowledge.methods.serac.editor import EDITOR

__all__ = ["EDITOR"]
