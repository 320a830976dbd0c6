"""The id that stands for image tokens in the input of a model of transformers."""

from __future__ import annotations

from typing import Any

NONE = -1  # of a language model: no token


def image_token_id(backbone: Any) -> int:
    """Return the id in the config of a backbone, -1 for one that sees nothing."""
    if not backbone.sees:
        return NONE
    config: Any = backbone.model.config
    # transformers calls it image_token_index in the older families
    found: int = getattr(config, "image_token_id", None) or config.image_token_index
    return found
