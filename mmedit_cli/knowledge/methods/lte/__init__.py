"""LTE: the fact stands in front of the questions it is about, and a trained LoRA follows what stands there."""

from mmedit_cli.knowledge.methods.lte.editor import EDITOR

__all__ = ["EDITOR"]
