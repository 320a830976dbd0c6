"""UltraEdit: one backward pass and a ridge regression change the weights; nothing is trained, nothing is routed."""

from mmedit_cli.knowledge.methods.ultraedit.editor import EDITOR

__all__ = ["EDITOR"]
