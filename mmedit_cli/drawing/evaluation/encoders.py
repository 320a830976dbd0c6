"""Encoders from the hub that pictures and texts are compared with."""

from __future__ import annotations

from mmedit_cli.drawing.evaluation.picture_scores import ClipEncoder, DinoEncoder
from mmedit_cli.errors import ModelError
from mmedit_cli.model_folder import loading


def load_clip_and_dino(
    clip: str, dino: str, device: str
) -> tuple[ClipEncoder | None, DinoEncoder | None]:
    """Return both encoders by their names; an empty name gives None. Raises ModelError if one cannot be used."""
    clip_encoder = None
    dino_encoder = None
    with loading(f"clip={clip} dino={dino}", hint="folders or hub ids"):
        if dino:
            dino_encoder = _load_dino(dino, device)
        if clip:
            clip_encoder = _load_clip(clip, device)
    if clip_encoder is not None and not hasattr(
        clip_encoder.model, "get_text_features"
    ):
        raise ModelError(
            f"clip={clip}: does not encode texts and pictures in one space",
            "name a CLIP",
        )
    return clip_encoder, dino_encoder


def _load_dino(name: str, device: str) -> DinoEncoder:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(name, trust_remote_code=False)
    return DinoEncoder(model.to(device), name)


def _load_clip(name: str, device: str) -> ClipEncoder:
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(name, trust_remote_code=False)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    return ClipEncoder(
        model.to(device),
        processor,
        name,
    )
