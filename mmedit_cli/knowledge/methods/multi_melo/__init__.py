"""Multi-MELO: an edit owns a small LoRA block, and an index of pictures and questions decides who gets which."""

from mmedit_cli.knowledge.methods.multi_melo.editor import EDITOR

__all__ = ["EDITOR"]
