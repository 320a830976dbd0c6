"""Perfusion: a gated rank-one edit of every key and value projection, with keys locked to the superclass."""

from mmedit_cli.drawing.methods.perfusion.personalizer import PERSONALIZER

__all__ = ["PERSONALIZER"]
