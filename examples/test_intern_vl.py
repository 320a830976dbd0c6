"""InternVL against the forward pass of transformers, with the picture as pixels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from mmedit_cli import Query, load_backbone


@pytest.fixture(autouse=True)
def _plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMEDIT_PLUGINS", str(Path(__file__).with_name("intern_vl.py")))


def test_logits_are_those_of_transformers(tmp_path: Path):
    picture = Image.new("RGB", (40, 30), "teal")
    picture.save(tmp_path / "teal.png")
    backbone = load_backbone("tiny-intern-vl", device="cpu")
    query = Query("What is this?", image=tmp_path / "teal.png")
    batch = backbone.batch([query], with_answer=False)

    tokens = "<img>" + 4 * "<image>" + "</img>\nWhat is this?"
    ids = torch.tensor([backbone.tokenizer(tokens)["input_ids"]])
    pixels = backbone.image_processor(images=[picture], return_tensors="pt")
    expected = backbone.model(input_ids=ids, **pixels).logits
    assert torch.equal(backbone.logits(batch), expected)
