"""The contracts on a CUDA device; `pytest -m gpu` on a machine that has one."""

from __future__ import annotations

import pytest
import torch
from conftest import QUERIES, SEEING, SHAPES

from mmedit_cli import load_editor
from mmedit_cli.knowledge.data.base import load_cases
from mmedit_cli.knowledge.evaluation.protocol import Protocol, evaluate_edits
from mmedit_cli.knowledge.evaluation.report import build_report
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.records import Run

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture(
    params=[(f, d) for f in SEEING for d in ("float32", "bfloat16")], ids="-".join
)
def backbone(request):
    return load_backbone(request.param[0], device=DEVICE, dtype=request.param[1])


def test_resume_is_bit_exact(backbone):
    batch = backbone.batch(QUERIES)
    assert batch.input_ids.device.type == torch.device(DEVICE).type
    expected = backbone.logits(batch)
    for layer in range(backbone.n_layers + 1):
        assert torch.equal(backbone.resume(backbone.prefix(batch, layer)), expected)


def test_generation_and_device_map(backbone):
    texts = backbone.generate(QUERIES, max_new_tokens=4)
    spread = load_backbone(
        backbone.name, device=DEVICE, dtype=str(backbone.dtype).removeprefix("torch.")
    )
    assert spread.generate(QUERIES, max_new_tokens=4) == texts


@pytest.mark.parametrize("target", ["lm", "connector"])
def test_ft_edits_and_undoes(backbone, target):
    batch = backbone.batch(QUERIES)
    base = backbone.logits(batch)
    editor = load_editor(
        "ft", backbone, overrides=[f"target={target}", "steps=10", "learning_rate=1e-2"]
    )
    edited = editor.edit(QUERIES[:1])
    assert edited.info["losses"][-1] < edited.info["losses"][0]
    editor.undo()
    assert torch.equal(backbone.logits(batch), base)


def test_an_evaluation(backbone, tmp_path):
    cases = load_cases(SHAPES, limit=4)
    with Run.open(tmp_path, {}, {}) as run:
        evaluate_edits(
            load_editor("ft", backbone, overrides=["steps=5"]),
            cases,
            run,
            Protocol(sequential=4),
        )
        report = build_report({}, run.read("cases"), run.read("edits"), 4)
    assert report["milestones"][0]["cases"] == 4
