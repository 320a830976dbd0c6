"""Multi-MELO for diffusion: a LoRA block a subject, all in one model, and a router that reads the prompt."""

from mmedit_cli.drawing.methods.multi_melo_diffusion.personalizer import PERSONALIZER

__all__ = ["PERSONALIZER"]
