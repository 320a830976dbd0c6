"""Encoders from the hub that pictures and texts are compared with."""

from __future__ import annotations

from mmedit_cli.drawing.evaluation.picture_scores import ClipEncoder, DinoEncoder
from mmedit_cli.errors import ModelError
from mmedit_cli.model_folder import loading


def load_clip_and_dino(
    clip: str, dino: str, device: str
) -> tuple[ClipEncoder | None, DinoEncoder | None]:
    """Return both encoders by their names (empty: None); raise ModelError if one cannot be used."""
    from transformers import AutoModel, AutoProcessor

    with loading(f"clip={clip} dino={dino}", hint="folders or hub ids"):
        eye = (
            AutoModel.from_pretrained(dino, trust_remote_code=False).to(device)
            if dino
            else None
        )
        both = (
            AutoModel.from_pretrained(clip, trust_remote_code=False).to(device)
            if clip
            else None
        )
        processor = (
            AutoProcessor.from_pretrained(clip, trust_remote_code=False)
            if clip
            else None
        )
    if both is not None and not hasattr(both, "get_text_features"):
        raise ModelError(
            f"clip={clip}: does not encode texts and pictures in one space",
            "name a CLIP",
        )
    return (
        ClipEncoder(both, processor, clip) if both is not None else None,
        DinoEncoder(eye, dino) if eye is not None else None,
    )
