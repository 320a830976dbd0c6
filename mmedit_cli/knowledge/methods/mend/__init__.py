"""MEND: trained networks turn the gradient of a request into a change of weights that also holds for rewordings."""

from mmedit_cli.knowledge.methods.mend.editor import EDITOR

__all__ = ["EDITOR"]
