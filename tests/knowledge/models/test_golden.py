"""The BLIP-2 adapter against a complete tiny model run through the published code."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.types import Query


@pytest.fixture(scope="module")
def recorded():
    from conftest import GOLDEN

    folder = GOLDEN / "liveedit_blip2"
    facts = json.loads((folder / "liveedit_blip2.json").read_text())
    return (
        folder,
        facts,
        load_file(folder / "liveedit_blip2.safetensors"),
        load_backbone(str(folder / "model"), device="cpu"),
    )


def test_sequences_states_and_logits(recorded):
    folder, facts, tensors, backbone = recorded
    layer = facts["settings"]["edit_layer"]
    for query in facts["queries"]:
        key = f"record{query['record']}.{query['query']}"
        image = folder / query["image"] if query["image"] else None
        batch = backbone.batch(
            [Query(query["prompt"], query["target_as_given"], image)]
        )
        assert batch.lengths == [query["length"]]
        assert int(batch.answer_mask.sum()) == query["answer_tokens"]
        span = batch.image_mask[0].nonzero().flatten().tolist()
        assert [span[0], span[-1] + 1] == query["vision_range"] if image else span == []
        assert int(batch.prompt_mask.sum()) + len(span) == query["query_end"]
        assert (
            batch.input_ids[0, len(span) :].tolist()
            == tensors[f"{key}.text_ids"].tolist()
        )
        assert batch.answers.tolist() == tensors[f"{key}.answer_ids"].tolist()
        assert (
            batch.predicting[0].nonzero().flatten().tolist()
            == tensors[f"{key}.answer_positions"].tolist()
        )
        logits = backbone.logits(batch)[batch.predicting]
        torch.testing.assert_close(
            logits, tensors[f"{key}.logits_base"], atol=2e-4, rtol=1e-4
        )
        assert logits.argmax(-1).tolist() == tensors[f"{key}.base_argmax"].tolist()
        if query["query"] == "rel":
            edit = f"edit{query['record']}"
            torch.testing.assert_close(
                backbone.embed(batch),
                tensors[f"{edit}.inputs_embeds"],
                atol=5e-5,
                rtol=1e-4,
            )
            hidden = backbone.prefix(batch, layer + 1).hidden
            torch.testing.assert_close(
                hidden, tensors[f"{edit}.hidden"], atol=2e-4, rtol=1e-4
            )
