"""LiveEdit: an edit becomes a low-rank expert, and a router decides by picture and prompt which experts answer."""

from mmedit_cli.knowledge.methods.liveedit.editor import EDITOR

__all__ = ["EDITOR"]
