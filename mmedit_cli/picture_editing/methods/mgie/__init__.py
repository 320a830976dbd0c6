"""MGIE: a multimodal language model spells the instruction out and guides the denoiser with eight visual tokens."""

from mmedit_cli.picture_editing.methods.mgie.editor import Mgie

IMAGE_EDITOR = Mgie
