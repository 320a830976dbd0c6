"""WISE: a side memory of one FFN matrix for edits, and a rule by how much it reacts that says when it answers."""

from mmedit_cli.knowledge.methods.wise.editor import EDITOR

__all__ = ["EDITOR"]
