"""ultraedit: its regression, its normaliser and its rows against naive forms, and what the line search keeps."""

from __future__ import annotations

import pytest
import torch
from conftest import SHAPES

from mmedit_cli.knowledge.data.base import load_cases
from mmedit_cli.knowledge.evaluation.protocol import distinct_queries
from mmedit_cli.knowledge.methods.shared.answer_rows import answer_rows
from mmedit_cli.knowledge.methods.shared.losses import answer_loss
from mmedit_cli.knowledge.methods.shared.ridge import KeptKeys, ridge
from mmedit_cli.knowledge.methods.shared.running_moments import RunningMoments
from mmedit_cli.knowledge.methods.shared.side_effects import (
    Unrelated,
    unrelated_questions,
)
from mmedit_cli.knowledge.methods.ultraedit.editor import Ultraedit
from mmedit_cli.knowledge.methods.ultraedit.hparams import UltraeditHparams
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.patch import trainable
from mmedit_cli.runtime import generator
from mmedit_cli.types import Query

REQUEST = Query("What is this?", "a blue star", SHAPES / "solid/red-circle.png")
OTHER = Query("Which colour is it?", "green", SHAPES / "outlined/blue-cross.png")


def rows(count, width, seed=0):
    return torch.randn(count, width, generator=generator(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def model():
    return load_backbone("tiny-blip2", device="cpu")


def direct(keys, values, moment):
    """The regression as it is written, with the large system."""
    whole = keys.T @ keys + moment
    return torch.linalg.inv(whole) @ keys.T @ values


@pytest.mark.parametrize("count", [1, 3, 8, 20])
def test_the_smaller_system_gives_the_same_change(count):
    keys, values = rows(count, 8), rows(count, 5, 1)
    penalty = 0.5 * torch.eye(8, dtype=torch.float64)
    expected = direct(keys, values, penalty)
    found = ridge(keys, values, 0.5)
    assert torch.allclose(found, expected, atol=1e-12)


def test_the_penalty_can_be_learned():
    penalty = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    inputs = (rows(3, 8), rows(3, 5, 1), penalty)
    assert torch.autograd.gradcheck(ridge, inputs)


def test_kept_keys_are_a_ridge_with_their_moment():
    before, keys, values = rows(6, 8, 2), rows(3, 8), rows(3, 5, 1)
    moment = 0.5 * torch.eye(8, dtype=torch.float64) + before.T @ before
    expected = direct(keys, values, moment)
    assert torch.allclose(KeptKeys.of(moment).ridge(keys, values), expected)
    kept = KeptKeys.of(0.5 * torch.eye(8))
    kept.remember(before)
    assert torch.allclose(kept.inverse, torch.linalg.inv(moment), atol=1e-12)


def test_edits_one_after_another_are_the_edits_at_once():
    """If each remembers its keys and aims at what the earlier ones left of its values."""
    keys, values = rows(7, 8), rows(7, 5, 1)
    together = ridge(keys, values, 0.5)
    kept = KeptKeys.of(0.5 * torch.eye(8))
    change = torch.zeros(8, 5, dtype=torch.float64)
    for start, end in ((0, 1), (1, 4), (4, 7)):
        some = keys[start:end]
        change = change + kept.ridge(some, values[start:end] - some @ change)
        kept.remember(some)
    assert torch.allclose(change, together, atol=1e-12)


@pytest.mark.parametrize("cuts", [(1, 1, 8), (3, 7), (10,)])
def test_the_moments_of_parts_are_those_of_all(cuts):
    every = rows(10, 4) * 1e3 + 1e5
    found = RunningMoments.empty(4, every.device)
    for part in every.split(cuts):
        found.add(part)
    assert found.count == 10
    assert torch.allclose(found.mean, every.mean(0))
    assert torch.allclose(found.deviation, every.std(0))
    normal = found.standardized(every)
    assert torch.allclose(normal.std(0), torch.ones(4, dtype=torch.float64))


def test_a_single_row_has_no_deviation_and_normalises_to_nothing():
    found = RunningMoments.empty(4, torch.device("cpu"))
    found.add(rows(1, 4))
    assert torch.equal(found.standardized(rows(3, 4, 1)), torch.zeros(3, 4).double())


def test_rows_make_up_the_gradient_of_the_weight(backbone):
    """The gradient of W is the sum of d x' over positions; in the last layer, over those that predict."""
    paths = [backbone.anchors.path("ffn_out", -1)]
    batch = backbone.batch([REQUEST, OTHER])
    prefix = backbone.prefix(batch, backbone.n_layers - 1)
    at, labels = batch.target_positions(backbone.end_id)
    found = answer_rows(backbone, prefix, at, labels[at], paths)
    weight = backbone.model.get_parameter(f"{paths[0]}.weight")
    with trainable([weight]):
        loss = answer_loss(backbone.resume(prefix, at), labels[at])
        (expected,) = torch.autograd.grad(loss, [weight])
    assert found.loss == pytest.approx(loss.item(), abs=1e-6)
    made = found.rows[paths[0]]
    assert torch.allclose(made.gradients.T @ made.inputs, expected, atol=1e-6)


def test_one_published_step_is_the_naive_one(model):
    """Everything of the paper's section 3 in float64: normalise, scale by the squared key, solve the large system."""
    hparams = UltraeditHparams(
        layers=(2,),
        search=False,
        warm=False,
        step_size=1e-3,
        unrelated=2,
        batch_size=8,
        teach_end=False,
    )
    editor = Ultraedit(model, hparams)
    path = model.anchors.path("ffn_out", 2)
    batch = model.batch([REQUEST, OTHER])
    prefix = model.prefix(batch, 2)
    answers = batch.labels[batch.answer_mask]
    found = answer_rows(model, prefix, batch.predicting, answers, [path]).rows[path]
    h, g = found.inputs.double(), found.gradients.double()
    varies = h.std(0) > 0
    h_hat = torch.where(varies, (h - h.mean(0)) / h.std(0), 0)
    g_hat = (g - g.mean(0)) / g.std(0)
    v = -1e-3 * (h_hat.norm(dim=1, keepdim=True) ** 2) * g_hat
    change = torch.linalg.solve(h.T @ h + torch.eye(h.shape[1]), h.T @ v).T
    before = model.model.get_parameter(f"{path}.weight").detach().clone()
    with editor.edit([REQUEST, OTHER]):
        moved = model.model.get_parameter(f"{path}.weight") - before
        assert change.abs().max() > 1e-3
        assert torch.allclose(moved, change.float(), atol=1e-6)


def test_a_turn_does_not_depend_on_its_parts(model):
    weights = []
    for size in (1, 2):
        hparams = UltraeditHparams(
            layers=(2,), unrelated=2, batch_size=size, search=False, step_size=1e-3
        )
        with Ultraedit(model, hparams).edit([REQUEST, OTHER]) as made:
            weights.append(made.editor.tensors())
    name = model.anchors.path("ffn_out", 2) + ".weight"
    assert torch.allclose(weights[0][name], weights[1][name], atol=1e-5)


def test_the_cap_bounds_what_happens_to_unrelated_questions(model):
    moved = []
    for cap in (1e-4, 1e-1):
        hparams = UltraeditHparams(layers=(2, 3), kl_cap=cap, unrelated=4, steps=3)
        editor = Ultraedit(model, hparams)
        asked = Unrelated.ask(model, unrelated_questions(4), 2)
        assert asked.divergence() == 0
        with editor.edit([REQUEST]) as made:
            moved.append(asked.divergence())
            losses = made.info["losses"]
            assert losses == sorted(losses, reverse=True)
        assert 0 < moved[-1] <= cap
    assert moved[0] < moved[1]


def test_earlier_edits_are_learned_again_beside_a_new_one(model):
    """Without, a long step for the second edit unteaches the first; the normaliser sees each edit once either way."""
    batch = model.batch([REQUEST])
    at, labels = batch.target_positions(model.end_id)
    losses, seen = [], []
    for replay in (0, 1):
        hparams = UltraeditHparams(
            layers=(1, 2, 3),
            steps=4,
            step_size=1e-3,
            kl_cap=10.0,
            unrelated=4,
            replay=replay,
        )
        editor = Ultraedit(model, hparams)
        editor.edit([REQUEST])
        with editor.edit([Query("Which colour?", "green", REQUEST.image)]) as made:
            logits = model.logits(batch)[at]
            losses.append(float(answer_loss(logits, labels[at])))
            seen.append(editor._moments[editor._paths[0]]["inputs"].count)
            assert len(made.ids) == 1
        editor.undo()
    assert losses[1] < losses[0]
    assert seen[0] == seen[1]


def test_unrelated_questions_are_none_of_the_evaluation():
    asked = set(unrelated_questions(64))
    assert len(asked) == 64
    assert any(query.image is None for query in asked)
    about_pictures = {(q.prompt, q.image) for q in asked if q.image is not None}
    evaluated = distinct_queries(load_cases("emojikb", limit=200))
    assert not about_pictures & {(q.prompt, q.image) for q in evaluated}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps must be above 0"),
        ({"keep": -1.0}, "keep must not be below 0"),
        ({"layers": ()}, "layers must name at least one"),
        ({"layers": (1.5,)}, "a fraction of the depth"),
    ],
)
def test_values_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        UltraeditHparams(**wrong)
