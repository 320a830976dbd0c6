"""RECIPE: a few soft tokens in front of a question carry an edit; a learned prototype says which questions get any."""

from mmedit_cli.knowledge.methods.recipe.editor import EDITOR

__all__ = ["EDITOR"]
