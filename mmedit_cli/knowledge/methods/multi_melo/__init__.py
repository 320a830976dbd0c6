"""Multi-MELO: each edit has a small LoRA block, and an index of pictures and questions chooses one for each query."""

from mmedit_cli.knowledge.methods.multi_melo.editor import EDITOR

__all__ = ["EDITOR"]
