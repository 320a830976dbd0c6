"""mend: the published networks and edits (golden), that changes add up, and training from cached gradients."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import SHAPES
from safetensors.torch import load_file

from mmedit_cli import registry
from mmedit_cli.errors import HparamsError, MmeditError, StateError
from mmedit_cli.hparams import load_hparams
from mmedit_cli.knowledge.data.base import read_data
from mmedit_cli.knowledge.methods.mend import training as mend_training
from mmedit_cli.knowledge.methods.mend.editor import Mend
from mmedit_cli.knowledge.methods.mend.gradients import (
    Aggregation,
    changes,
    request_rows,
)
from mmedit_cli.knowledge.methods.mend.hparams import MendHparams, MendTraining
from mmedit_cli.knowledge.methods.mend.networks import Transform, nonzero
from mmedit_cli.knowledge.methods.mend.training import FrozenRows, changed, choose
from mmedit_cli.knowledge.methods.shared.answer_rows import AnswerRows
from mmedit_cli.knowledge.methods.shared.losses import answer_loss
from mmedit_cli.knowledge.methods.shared.running_moments import RunningMoments
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.knowledge.training_loop import train_networks
from mmedit_cli.patch import Patch, trainable
from mmedit_cli.records import Run
from mmedit_cli.runtime import generator
from mmedit_cli.types import Query

REQUESTS = (
    Query("What is this?", "a blue star", SHAPES / "solid/red-circle.png"),
    Query("Which colour is it?", "green", SHAPES / "outlined/blue-cross.png"),
    Query("What is the capital of Peru?", "Cusco"),
)
CASES = read_data(SHAPES).cases
SHORT = (
    "training.steps=4",
    "training.batch_size=4",
    "training.validate_every=2",
    "training.others=2",
    "training.alternatives=1",
)


@pytest.fixture(scope="module")
def model():
    return load_backbone("tiny-blip2", device="cpu")


def make(backbone, *overrides):
    path = registry.hparams_file("mend")
    variant = backbone.name
    hparams = load_hparams(path, MendHparams, variant=variant, overrides=overrides)
    editor = Mend(backbone, hparams)
    with torch.no_grad():  # networks that do something
        for name, parameter in editor.networks.named_parameters():
            if name.endswith(".u"):
                parameter.normal_(0, 1e-2, generator=generator(1))
    return editor


def close(ours, theirs, atol=1e-4, rtol=1e-3):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol)


# -- as published -------------------------------------------------------------------------------------------------


def published(tensors, prefix, shape, matrices):
    """A transform with the weights of the published one."""
    transform = Transform(*shape, matrices, 8, 2)
    names = {
        "u": "u",
        "v": "v",
        "bias": "bias",
        "gain": "mode_scale.weight",
        "shift": "mode_shift.weight",
    }
    with torch.no_grad():
        for number, layer in enumerate(transform.layers):
            for ours, theirs in names.items():
                value = tensors[f"{prefix}.mlp.layers.{number}.{theirs}"]
                layer.get_parameter(ours).copy_(value)
    return transform


def test_the_published_network_and_its_moments(golden):
    tensors = load_file(golden / "mend.safetensors")
    transform = published(tensors, "transform", (10, 7), 3)
    device = torch.device("cpu")
    moments = [RunningMoments.empty(width, device) for width in (10, 7)]
    for call in range(4):
        key = f"call{call}."
        read = tensors[key + "x"].flatten(0, 1)
        lost = tensors[key + "delta"].flatten(0, 1)
        rows = nonzero(AnswerRows(read, lost))
        if tensors[key + "training"]:
            moments[0].add(rows.inputs)
            moments[1].add(rows.gradients)
        transform.normalizer.set_(*moments)
        edited = transform(rows, int(tensors[key + "module_index"]))
        close(edited.inputs, tensors[key + "x_out"])
        close(edited.gradients, tensors[key + "delta_out"])
        for name, seen in zip("uv", moments, strict=True):
            close(seen.mean.float(), tensors[f"{key}after.{name}_mean"])
            close(seen.deviation.float(), tensors[f"{key}after.{name}_std"])
        assert moments[0].count == int(tensors[key + "after.k"])


def test_the_published_edits_are_our_sum_over_the_tokens_seen(golden):
    """Published is the mean over the tokens of all edits so far: the sum, divided by their number."""
    tensors = load_file(golden / "mend.safetensors")
    settings = json.loads((golden / "mend.json").read_text())["settings"]
    folder = golden / "liveedit_blip2"
    records = json.loads((folder / "records_vqa.json").read_text())
    asked = [
        Query(
            record["src"] + " The answer is:",
            record["alt"],
            folder / "images" / record["image"],
        )
        for record in records
    ]
    backbone = load_backbone(str(folder / "model"), device="cpu")
    hparams = MendHparams(layers=2, rank=settings["rank"])
    networks = Mend(backbone, hparams).networks
    rate = torch.full((4,), -settings["edit_lr"])  # theirs goes up the gradient
    networks.step_sizes.data = rate / networks.pace
    for key, transform in networks.transforms.items():
        twin = published(tensors, f"aux.{key}", transform.widths, 2)
        for part, name in (("inputs", "u"), ("gradients", "v")):
            mean = tensors[f"aux.{key}.{name}_mean"]
            deviation = tensors[f"aux.{key}.{name}_std"]
            twin.normalizer.get_buffer(f"{part}_mean").copy_(mean)
            twin.normalizer.get_buffer(f"{part}_deviation").copy_(deviation)
        twin.normalizer.count.fill_(2)
        transform.load_state_dict(twin.state_dict())
    paths = {
        backbone.anchors.path(role, layer): f"{layer}.{name}"
        for role, name in (("ffn_in", "fc1"), ("ffn_out", "fc2"))
        for layer in (4, 5)
    }
    totals = dict.fromkeys(paths, 0.0)
    counts = dict.fromkeys(paths, 0)
    with Patch(backbone.model) as patch, torch.no_grad():
        for number in settings["records_edited"]:
            [rows], _ = request_rows(
                backbone, [asked[number]], 4, list(paths), teach_end=False
            )
            change = changes(networks, [rows], Aggregation(None))
            with patch.lifted():
                untouched = {p: patch.parameter(f"{p}.weight").clone() for p in paths}
            for path, name in paths.items():
                key = f"edit{number}.{name}."
                close(rows[path].inputs, tensors[key + "x"])
                close(rows[path].gradients, tensors[key + "delta"])
                totals[path] = totals[path] + change[path]
                counts[path] += len(nonzero(rows[path]).inputs)
                mean = totals[path] / counts[path]
                close(mean, tensors[key + "delta_weight"])
                patch.set_(f"{path}.weight", untouched[path] + mean.T)
        for number, query in enumerate(asked):
            batch = backbone.batch([query])
            said = backbone.logits(batch)[batch.predicting]
            close(said, tensors[f"record{number}.logits_edited"], atol=1e-3)


def test_untrained_networks_leave_the_gradient_as_it_is():
    rows = AnswerRows(torch.randn(4, 6), torch.randn(4, 3))
    edited = Transform(6, 3, 2, 4, 2)(rows, 1)
    assert torch.equal(edited.inputs, rows.inputs)
    assert torch.equal(edited.gradients, rows.gradients)


def test_what_never_varied_is_not_blown_up():
    transform = Transform(2, 2, 1, 4, 2)
    inputs = RunningMoments.empty(2, torch.device("cpu"))
    inputs.add(torch.tensor([[0.0, 1.0], [0.0, 3.0]]))
    gradients = RunningMoments.empty(2, torch.device("cpu"))
    gradients.add(torch.tensor([[1.0, 1.0], [2.0, 3.0]]))
    transform.normalizer.set_(inputs, gradients)
    rows = AnswerRows(torch.tensor([[0.1, 2.0]]), torch.ones(1, 2))
    assert transform(rows, 0).inputs.abs().max() < 1e-5


# -- gradients ----------------------------------------------------------------------------------------------------


def test_rows_make_the_gradient_and_need_no_company(model):
    """The gradient of a matrix is the sum of the outer products over all tokens, those of the picture too."""
    path = model.anchors.path("ffn_in", 3)
    together, _ = request_rows(model, REQUESTS, 3, [path], teach_end=True)
    for request, found in zip(REQUESTS, together, strict=True):
        [alone], loss = request_rows(model, [request], 3, [path], teach_end=True)
        close(alone[path].inputs, found[path].inputs, atol=1e-5)
        close(alone[path].gradients, found[path].gradients, atol=1e-6)
        batch = model.batch([request])
        at, labels = batch.target_positions(model.end_id)
        weight = model.model.get_parameter(f"{path}.weight")
        with trainable([weight]):
            logits = model.resume(model.prefix(batch, 3), at)
            naive = answer_loss(logits, labels[at])
            (gradient,) = torch.autograd.grad(naive, [weight])
        assert loss == pytest.approx(naive.item(), abs=1e-5)
        outer = alone[path].gradients.T @ alone[path].inputs
        close(outer, gradient, atol=1e-6)
    assert len(nonzero(together[0][path]).inputs) > 4, "tokens before the answer count"


def test_a_regression_changes_the_output_of_a_token_as_its_own_change_would():
    inputs = torch.randn(3, 8)
    rows = torch.randn(3, 8)
    gradients = torch.randn(3, 5)
    edited = AnswerRows(rows, gradients)
    regression = Aggregation(1e-9)
    change = regression(inputs, edited)
    alone = [torch.outer(rows[i], gradients[i]) for i in range(3)]
    for i in range(3):
        close(inputs[i] @ change, inputs[i] @ alone[i])
    adding_up = Aggregation(None)
    close(adding_up(inputs, edited), sum(alone))


# -- edits --------------------------------------------------------------------------------------------------------


def test_changes_of_a_batch_and_of_edits_in_a_row_add_up(model):
    """Each from the untouched model: so the order does not matter, and no edit fades while others come."""
    editor = make(model, "chain=base")
    singles = []
    for request in REQUESTS:
        with editor.edit([request]):
            singles.append(editor.state()[0])
    for operations in (
        [REQUESTS],
        [[request] for request in REQUESTS],
        [[request] for request in reversed(REQUESTS)],
    ):
        for requests in operations:
            editor.edit(requests)
        for path, total in editor.state()[0].items():
            close(total, sum(single[path] for single in singles), atol=1e-6)
        editor.undo()


def test_a_later_edit_starts_from_the_edited_model(model):
    first, second = (make(model, f"chain={chain}") for chain in ("current", "base"))
    states = []
    for editor in (first, second):
        for request in REQUESTS[:2]:
            editor.edit([request])
        states.append(editor.state()[0])
        editor.undo()
    path = next(iter(states[0]))
    assert not torch.allclose(states[0][path], states[1][path], atol=1e-6)


def test_the_order_of_batches_changes_nothing(model):
    """batch_size is how many requests fit into one backward pass."""
    states = []
    for size in (1, 8):
        editor = make(model, f"batch_size={size}")
        with editor.edit(REQUESTS):
            states.append(editor.state()[0])
    for path, total in states[0].items():
        close(states[1][path], total, atol=1e-6)


def test_a_weight_is_rounded_once():
    """In bfloat16 the sum of the changes is kept in float32, or small ones would be lost."""
    backbone = load_backbone("tiny-blip2", device="cpu", dtype="bfloat16")
    editor = make(backbone)
    path = editor._paths[0]
    before = backbone.model.get_parameter(f"{path}.weight").detach().clone()
    for request in REQUESTS:
        editor.edit([request])
    total = editor.state()[0][path]
    assert total.dtype == torch.float32
    wanted = (before.float() + total.T).bfloat16()
    assert torch.equal(backbone.model.get_parameter(f"{path}.weight"), wanted)
    editor.undo()


def test_what_becomes_infinite_is_said_and_undone(model):
    editor = make(model, "step_size=1e38")
    with pytest.raises(MmeditError, match="infinite"):
        editor.edit(REQUESTS)
    assert not editor.requests
    assert not editor._changes


def test_a_state_of_other_matrices_is_refused(model):
    editor = make(model)
    editor.edit(REQUESTS[:1])
    tensors, metadata = editor.state()
    tensors.pop(next(iter(tensors)))
    with pytest.raises(StateError, match="the changes of 6 matrices"):
        editor.load_state(tensors, metadata)
    editor.undo()


# -- training -----------------------------------------------------------------------------------------------------


def test_training_sees_the_model_that_an_edit_makes(model):
    """What is added to the outputs is what changed weights would add."""
    editor = make(model)
    rows, _ = request_rows(
        model, REQUESTS, editor.first_layer, editor._paths, teach_end=True
    )
    aggregation = Aggregation(None)
    groups = [
        changes(editor.networks, rows[:1], aggregation),
        changes(editor.networks, rows, aggregation),
    ]
    batch = model.batch(REQUESTS)
    prefix = model.prefix(batch, editor.first_layer)
    with torch.no_grad(), changed(model, groups, [0, 1, 1]):
        added = model.resume(prefix)
    for requests, own in ((REQUESTS[:1], [0]), (REQUESTS, [1, 2])):
        with editor.edit(requests), torch.no_grad():
            wanted = model.resume(model.prefix(batch, editor.first_layer))
        close(added[own], wanted[own], atol=1e-4)


def test_gradients_are_computed_once(model, monkeypatch):
    calls = []
    original = mend_training.request_rows

    def counted(*args, **options):
        calls.append(args[1])
        return original(*args, **options)

    monkeypatch.setattr(mend_training, "request_rows", counted)
    paths = [model.anchors.path("ffn_out", 4)]
    frozen = FrozenRows(model, 4, paths, teach_end=True)
    frozen.plan(REQUESTS[:2])
    first = frozen.of(REQUESTS)
    again = frozen.of(REQUESTS[::-1])
    assert sorted(map(len, calls)) == [1, 2]
    for one, other in zip(first, again[::-1], strict=True):
        assert torch.equal(one[paths[0]].inputs, other[paths[0]].inputs)
        assert torch.equal(one[paths[0]].gradients, other[paths[0]].gradients)


def test_the_request_is_not_asked_unless_it_counts():
    """It is the input of the networks; without rewordings it stands in for them."""
    groups = [CASES[:2], CASES[2:4]]
    asked = choose(groups, generator(0), reliability=False)
    assert "reliability" not in asked.columns
    assert {"generality", "locality"} == {c.split(".")[0] for c in asked.columns}
    assert set(asked.groups) == {0, 1}
    more = choose(groups, generator(0), reliability=True)
    assert more.columns.count("reliability") == 4
    (case,) = CASES[:1]
    bare = type(case)(case.uid, case.request)
    assert choose([[bare]], generator(0), reliability=False).queries == [case.request]


def test_the_shares_of_processes_add_up(model):
    editor = make(model, "training.together=1")
    networks = editor.networks
    networks.requires_grad_(True)
    editor.gather(CASES[:4])
    found = []
    for shares in ([(0, 1)], [(0, 2), (1, 2)]):
        networks.zero_grad()
        totals = []
        for rank, world in shares:
            losses = editor.losses(
                CASES[:3], generator(0), others=CASES[3:4], rank=rank, world=world
            )
            losses["total"].backward()
            totals.append(losses["total"].item())
        gradients = [parameter.grad.clone() for parameter in networks.parameters()]
        found.append((sum(totals), gradients))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    for whole, parts in zip(found[0][1], found[1][1], strict=True):
        close(parts, whole, atol=1e-5 * max(1.0, float(whole.abs().max())))


def train(backbone, folder):
    editor = make(backbone, *SHORT)
    with Run.open(folder, {"run": "same"}, {}) as run:
        train_networks(editor, CASES[:8], CASES[8:11], run)
    return load_file(folder / "editor.safetensors")


def test_normalisers_are_saved_with_the_networks(model, tmp_path):
    trained = train(model, tmp_path / "run")
    counts = [name for name in trained if name.endswith("normalizer.count")]
    assert len(counts) == 2
    assert all(trained[name] > 8 for name in counts), "rows of tokens, not of requests"
    editor = make(model, *SHORT, "training.step_size_pace=7")
    editor.load_networks(tmp_path / "run" / "editor.safetensors")
    for name, tensor in editor.networks.state_dict().items():
        assert torch.equal(tensor, trained[name]), name


def test_bad_values_are_explained(model):
    for wrong in ({"layers": 0}, {"rank": 0}, {"roles": ()}, {"step_size": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MendHparams(**wrong)
    for wrong in ({"together": 0}, {"patience": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MendTraining(**wrong)
    with pytest.raises(HparamsError, match="layers 9"):
        make(model, "layers=9")
