"""UniKE: new neurons in the last layers for each edit, beside a latent memory of what the model got wrong."""

from mmedit_cli.knowledge.methods.unike.editor import EDITOR

__all__ = ["EDITOR"]
