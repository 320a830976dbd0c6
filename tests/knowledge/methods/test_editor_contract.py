"""What every editor promises on every backbone; a new editor inherits these tests by being in its folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import SHAPES, asked
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from mmedit_cli import registry
from mmedit_cli.errors import DataError, StateError
from mmedit_cli.hparams import load_hparams
from mmedit_cli.knowledge.data.base import read_data
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.knowledge.training_loop import Conditions, train_networks
from mmedit_cli.plugins import plugin_sources
from mmedit_cli.records import Run
from mmedit_cli.runtime import generator
from mmedit_cli.types import EditCase, Query

REQUESTS = (
    Query("What is this?", "a blue star", SHAPES / "solid/red-circle.png"),
    Query("Which colour is it?", "green", SHAPES / "outlined/blue-cross.png"),
    Query(
        "What can you see in the picture?",
        "a yellow house",
        SHAPES / "corner/green-ring.png",
    ),
)
TEXT_REQUESTS = (
    Query("What is a star?", "a blue house"),
    Query("The colour of the moon is", "green"),
    Query("Where can you see an apple tree?", "a yellow boat"),
)
VARIANTS = {
    "ft": (("steps=15",), ("steps=15", "learning_rate=1e-2", "target=connector")),
    "grace": (("steps=30",), ("steps=30", "radius=balanced")),
    "ike": ((f"facts={SHAPES / 'cases.jsonl'}",),),
    "m-ore": ((), ("memory=1.0", "active=2")),
    "wise": (
        ("steps=20", "edits_per_memory=2"),
        ("steps=20", "edits_per_memory=1", "mode=merge", "replay=1"),
    ),
    "liveedit": ((), ("variant=paper",), ("naming=What can be seen?",)),
    "lora": (("steps=20",),),
    "multi-melo": (
        ("steps=15",),
        ("steps=40", "edits_per_block=2", "jitter=0.3"),
        ("steps=40", "router=melo", "cluster_radius=1"),
    ),
    # as published edits disturb each other: with longer steps the last of three unteaches the second
    "unike": ((), ("mode=reference", "external=false", "learning_rate=3e-2")),
    "mend": ((), ("aggregate=ridge", "chain=base")),
    "memit": ((), ("remember=true", "answer_keys=false")),
    "ultraedit": (
        (),
        ("values=raw", "warm=false"),
        ("remember=false", "keep=0", "replay=2"),
    ),
    "lte": ((),),
    "recipe": ((),),
    "serac": ((),),
    "t-patcher": (
        (),
        (
            "variant=paper",
            "neurons=5",
            "steps=40",
            "activation_weight=1.0",
            "memory_weight=0.1",
        ),
    ),
}
# (steps, learning rate) until the networks know the requests; some forms know them earlier
TRAINING = (200, 3e-3)
SHORTER = {
    ("liveedit",): (100, 6e-3),
    ("liveedit", "naming=What can be seen?"): (60, 6e-3),
    ("lte",): (60, 6e-3),
    ("mend",): (15, 1e-3),
    ("mend", "aggregate=ridge"): (15, 1e-3),
    ("recipe",): (100, 6e-3),
    ("serac",): (40, 6e-3),
    ("unike",): (40, 6e-3),
}
AFTER_TRAINING = ("refine=", "margin=", "chain=")  # what training does not depend on
IN_CONTEXT = {
    "ike"
}  # random weights have not learned to read a context: the answer changes, for better or worse
# these differ in kind: new weights, trained networks with a router, a codebook; others repeat them, but for plug-ins
EXEMPLARS = ("ft", "grace", "liveedit")
_NIGHTLY = (pytest.mark.slow, pytest.mark.nightly)
FAMILIES = (  # one with each thing that is special
    "tiny-blip2",
    "tiny-llava",
    pytest.param("tiny-qwen3-vl", marks=_NIGHTLY),
    "tiny-llama-lm",
    pytest.param("tiny-gpt2-lm", marks=_NIGHTLY),
)


def editors() -> Iterator[pytest.ParameterSet]:
    """Every editor in each of its forms; the first forms of exemplars and of plug-ins are fast."""
    outside = {name for name, source in plugin_sources("mmedit.editors", "EDITOR")}
    for name in registry.editors.names():
        is_fast = name in EXEMPLARS or name in outside
        for i, overrides in enumerate(VARIANTS.get(name, ((),))):
            marks = [] if is_fast and not i else [pytest.mark.slow]
            named = [text for text in overrides if not text.startswith("facts=")]
            yield pytest.param(
                (name, overrides), id="-".join((name, *named)), marks=marks
            )


EDITORS = list(editors())


def slow_but_for(first: str) -> list[pytest.ParameterSet]:
    """All forms of all editors; those of all but one editor are slow."""
    found = []
    for form in EDITORS:
        (named,) = form.values
        marks = form.marks if named[0] == first else [pytest.mark.slow]
        found.append(pytest.param(named, id=form.id, marks=marks))
    return found


def taught(backbone) -> tuple[Query, ...]:
    """What tests teach a model: about pictures, if it sees them."""
    return REQUESTS if backbone.sees else TEXT_REQUESTS


def skip_unless_able(form, backbone) -> None:
    """Skip what needs pictures on a language model; test_causal_lm.py has how it is refused."""
    name, overrides = form
    needs = registry.editors.get(name).needs_image or "target=connector" in overrides
    if name in ("wise", "m-ore") and backbone.name == "tiny-gpt2-lm":
        pytest.skip(f"{name} refuses the transposed matrices of GPT-2")
    if needs and not backbone.sees:
        pytest.skip(f"{name} needs pictures")


def snapshot(backbone) -> dict:
    """Everything an editor could leave behind: bits of tensors, hooks, flags, gradients."""
    model = backbone.model
    return {
        "tensors": {k: v.clone() for k, v in model.state_dict().items()},
        "hooks": {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks))
            for n, m in model.named_modules()
        },
        "modules": {n: id(m) for n, m in model.named_modules()},
        "flags": {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()},
        "training": {n: m.training for n, m in model.named_modules()},
    }


def assert_same(after: dict, before: dict) -> None:
    for key in before:
        if key != "tensors":
            assert after[key] == before[key], key
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, tensor in before["tensors"].items():
        assert torch.equal(after["tensors"][name], tensor), name


def likelihood(backbone, requests) -> torch.Tensor:
    """Mean log-probability of the target of each request: (n,)."""
    scores = []
    with torch.no_grad():
        for request in requests:
            batch = backbone.batch([request])
            rows = backbone.logits(batch)[batch.predicting].float().log_softmax(-1)
            scores.append(rows.gather(1, batch.answers[:, None]).mean())
    return torch.stack(scores)


def assert_learned(name, before, after, *, by=0.0) -> None:
    assert (after != before if name in IN_CONTEXT else after > before + by).all()


def logits(backbone) -> torch.Tensor:
    with torch.no_grad():
        return backbone.logits(backbone.batch((*asked(backbone), *taught(backbone))))


def make(name, overrides, backbone, *, seed=0, trained=True):
    cls = registry.editors.get(name)
    hparams = load_hparams(
        registry.hparams_file(name),
        cls.Hparams,
        variant=backbone.name,
        overrides=overrides,
    )
    editor = cls(backbone, hparams, seed=seed)
    if editor.trains and trained:
        training = tuple(o for o in overrides if not o.startswith(AFTER_TRAINING))
        editor.networks.load_state_dict(networks(name, training, backbone.name))
    return editor


@cache
def networks(name, overrides, family):
    """Networks that have learned the requests of this file by heart."""
    backbone = load_backbone(family, device="cpu")
    cls = registry.editors.get(name)
    hparams = load_hparams(
        registry.hparams_file(name), cls.Hparams, variant=family, overrides=overrides
    )
    editor = cls(backbone, hparams, seed=1)
    editor.networks.requires_grad_(True)
    steps, rate = SHORTER.get((name, *overrides), TRAINING)
    optimizer = torch.optim.Adam(editor.networks.parameters(), lr=rate)
    pictures = (
        "solid/blue-star.png",
        "outlined/yellow-cross.png",
        "corner/red-ring.png",
    )
    seen = tuple(
        Query("What is this?", "a shape", SHAPES / picture) for picture in pictures
    )
    read = (Query("What is a boat?", "a shape"), Query("The sun is", "a shape"))
    local = {"image": seen} if backbone.sees else {"text": read}
    cases = [
        EditCase(str(i), request, {"same": (request,)}, local)
        for i, request in enumerate(taught(backbone))
    ]
    for step in range(steps):
        optimizer.zero_grad()
        editor.losses(cases, generator(step))["total"].backward()
        optimizer.step()
    return {key: value.detach() for key, value in editor.networks.state_dict().items()}


@pytest.fixture(scope="session", params=FAMILIES)
def backbone(request):
    """A tiny backbone that all tests share: each leaves it as it was."""
    loaded = load_backbone(request.param, device="cpu")
    loaded.generate(
        asked(loaded)[:1], max_new_tokens=1
    )  # transformers installs hooks of its own at the first pass
    return loaded


@pytest.fixture(params=EDITORS)
def editor(request, backbone):
    """A fresh editor; the shared backbone must come out of each test as it went in."""
    skip_unless_able(request.param, backbone)
    before = snapshot(backbone)
    made = make(*request.param, backbone)
    made.recipe = request.param
    yield made
    made.undo()
    assert_same(snapshot(backbone), before)


def test_a_first_edit_that_fails_says_why_and_leaves_nothing(editor, monkeypatch):
    def fail(*_: object) -> None:
        raise DataError("this request cannot be used")

    monkeypatch.setattr(editor, "_apply", fail)
    with pytest.raises(DataError, match="cannot be used"):
        editor.edit(taught(editor.backbone)[:1])
    assert not editor.requests


def test_the_target_becomes_likelier(editor):
    requests = taught(editor.backbone)
    before = likelihood(editor.backbone, requests[:1])
    edited = editor.edit(requests[:1])
    assert edited.ids == (1,)
    assert_learned(
        editor.name, before, likelihood(editor.backbone, requests[:1]), by=0.5
    )


def test_undo_is_bit_exact(editor):
    requests = taught(editor.backbone)
    before, base = snapshot(editor.backbone), logits(editor.backbone)
    editor.edit(requests[:1])
    editor.edit(requests[1:])
    assert not torch.equal(logits(editor.backbone), base)
    editor.undo()
    assert editor.operations == []
    assert_same(snapshot(editor.backbone), before)
    assert torch.equal(logits(editor.backbone), base)


def test_undo_of_one_edit_is_as_if_it_had_never_been(editor):
    requests = taught(editor.backbone)
    ids = [editor.edit([request]).ids[0] for request in requests]
    editor.undo(ids[1:2])
    left = logits(editor.backbone)
    editor.undo()
    editor._next_id = ids[0]  # randomness belongs to the id of an edit
    editor.edit(requests[:1])
    editor._next_id = ids[2]
    editor.edit(requests[2:])
    assert torch.equal(logits(editor.backbone), left)


def test_the_handle_undoes_its_own_edits(editor):
    requests = taught(editor.backbone)
    editor.edit(requests[:1])
    once = logits(editor.backbone)
    with editor.edit(requests[1:2]):
        assert not torch.equal(logits(editor.backbone), once)
    assert torch.equal(logits(editor.backbone), once)
    with pytest.raises(StateError, match="no edit 99 to undo"):
        editor.undo([99])


def test_what_lies_below_first_layer_never_changes(editor):
    requests = taught(editor.backbone)
    backbone = editor.backbone
    if editor.first_layer is None:  # what enters the language model changes
        plain = asked(editor.backbone)[1:2]
        before = backbone.prefix(backbone.batch(plain), 3).hidden
        editor.edit(requests)
        after = backbone.prefix(backbone.batch(plain), 3).hidden
        rewritten = backbone.rewrite is not None and editor.affects(plain)[0]
        assert torch.equal(after, before) != rewritten, "without a picture only words"
        return
    batch = backbone.batch(asked(editor.backbone))
    layers = range(editor.first_layer + 1)
    before = [backbone.prefix(batch, layer).hidden for layer in layers]
    editor.edit(requests)
    for layer in layers:
        assert torch.equal(backbone.prefix(batch, layer).hidden, before[layer]), layer


def test_save_and_load_give_the_same_logits(editor, tmp_path):
    requests = taught(editor.backbone)
    editor.edit(requests[:2])
    editor.edit(requests[2:])
    edited = logits(editor.backbone)
    editor.save(tmp_path / "state.safetensors")
    editor.undo()
    fresh = make(*editor.recipe, editor.backbone)
    fresh.load(tmp_path / "state.safetensors")
    assert torch.equal(logits(editor.backbone), edited)
    assert [op.requests for op in fresh.operations] == [requests[:2], requests[2:]]
    fresh.undo([3])
    remaining = logits(editor.backbone)
    fresh.undo()
    editor._next_id = 1
    editor.edit(requests[:2])
    assert torch.equal(logits(editor.backbone), remaining), (
        "a loaded editor undoes like the one that was saved"
    )


@pytest.mark.parametrize(
    "backwards",
    [
        pytest.param(False, id="forwards"),
        pytest.param(True, id="backwards", marks=pytest.mark.slow),
    ],
)
def test_an_edit_after_loading_is_the_edit_without_it(editor, backwards):
    """A file lists its tensors in any order."""
    requests = taught(editor.backbone)
    editor.edit(requests[:1])
    tensors, metadata = editor.state()
    editor.edit(requests[1:])
    whole, _ = editor.state()
    edited = logits(editor.backbone)
    editor.undo()
    fresh = make(*editor.recipe, editor.backbone)
    names = sorted(tensors, reverse=backwards)
    fresh.load_state({name: tensors[name] for name in names}, metadata)
    fresh.edit(requests[1:])
    continued, _ = fresh.state()
    try:
        assert torch.equal(logits(editor.backbone), edited)
        assert continued.keys() == whole.keys()
        for name, tensor in whole.items():
            assert torch.equal(continued[name], tensor), name
    finally:
        fresh.undo()


def test_a_state_of_another_kind_is_refused(editor, tmp_path):
    requests = taught(editor.backbone)
    editor.edit(requests[:1])
    tensors, metadata = editor.state()
    for key, value in (
        ("model", "other"),
        ("hparams", "{}"),
        ("editor", "nobody"),
        ("dtype", "torch.int8"),
    ):
        with pytest.raises(StateError, match=f"made with {key}"):
            editor.load_state(tensors, {**metadata, key: value})
    with pytest.raises(StateError, match="format 99, newer"):
        editor.load_state(tensors, {**metadata, "format": "99"})
    (tmp_path / "bad").write_bytes(b"not tensors")
    with pytest.raises(StateError, match="not a safetensors file"):
        editor.load(tmp_path / "bad")


def test_no_requests_change_nothing(editor):
    before = snapshot(editor.backbone)
    assert editor.edit([]).ids == ()
    assert_same(snapshot(editor.backbone), before)


def test_the_same_seed_gives_the_same_result(editor):
    requests = taught(editor.backbone)
    editor.edit(requests)
    first = logits(editor.backbone)
    editor.undo()
    again = make(*editor.recipe, editor.backbone)
    again.edit(requests)
    assert torch.equal(logits(editor.backbone), first)
    again.undo()


def test_a_failed_edit_leaves_the_earlier_ones(editor, tmp_path):
    requests = taught(editor.backbone)
    editor.edit(requests[:1])
    once = snapshot(editor.backbone)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError):
        editor.edit([requests[1], replace(requests[2], image=tmp_path / "broken.png")])
    assert_same(snapshot(editor.backbone), once)
    assert editor.edit(requests[1:2]).ids == (2,)


def same_tensors(some, others) -> bool:
    """Whether two tables hold equal tensors under the same names."""
    if some.keys() != others.keys():
        return False
    return all(torch.equal(some[name], others[name]) for name in some)


def test_what_fails_when_the_model_is_changed_already_is_rolled_back(
    editor, monkeypatch
):
    """After the first step of an optimizer; without steps, when the edits are made."""
    requests = taught(editor.backbone)
    editor.edit(requests[:1])
    once, before = logits(editor.backbone), snapshot(editor.backbone)
    kept = {name: tensor.clone() for name, tensor in editor.tensors().items()}
    operations, apply = list(editor.operations), editor._apply
    armed = [ZeroDivisionError]

    def fail_once(*_):
        if armed:
            raise armed.pop()

    def late(requests, source):
        info = apply(requests, source)
        fail_once()
        return info

    monkeypatch.setattr(editor, "_apply", late)
    handle = register_optimizer_step_post_hook(fail_once)
    try:
        with pytest.raises(ZeroDivisionError):
            editor.edit(requests[1:])
    finally:
        handle.remove()
    assert editor.operations == operations
    assert same_tensors(editor.tensors(), kept)
    assert_same(snapshot(editor.backbone), before)
    assert torch.equal(logits(editor.backbone), once)
    assert editor.edit(requests[1:2]).ids == (2,)


def test_a_batch_edit_teaches_all_of_it(editor):
    requests = taught(editor.backbone)
    before = likelihood(editor.backbone, requests)
    editor.edit(requests)
    after = likelihood(editor.backbone, requests)
    if "mode=reference" in editor.recipe[1] and editor.backbone.family == "causal-lm":
        # in a small GPT-2 the last of three, as published, unteaches the second
        before, after = before[-1:], after[-1:]
    assert_learned(editor.name, before, after)


@pytest.mark.parametrize("form", slow_but_for("ft"))
def test_two_editors_on_two_models_do_not_disturb_each_other(form):
    models = [load_backbone(family, device="cpu") for family in FAMILIES[:2]]
    editors = [make(*form, model) for model in models]
    requests = taught(models[0])
    editors[0].edit(requests[:1])
    alone = logits(models[0])
    editors[1].edit(requests)
    assert torch.equal(logits(models[0]), alone)
    editors[1].undo()
    assert torch.equal(logits(models[0]), alone)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", EDITORS)
def test_bfloat16(form, family):
    name, overrides = form
    backbone = load_backbone(family, device="cpu", dtype="bfloat16")
    skip_unless_able(form, backbone)
    requests = taught(backbone)[:1]
    before = likelihood(backbone, requests)
    base = snapshot(
        backbone
    )  # after a first pass: transformers installs hooks of its own in it
    editor = make(name, overrides, backbone)
    editor.edit(requests)
    assert_learned(name, before, likelihood(backbone, requests), by=0.3)
    editor.undo()
    assert_same(snapshot(backbone), base)


# a training of few steps, cut in the middle of the second half; what an editor has not is left out
SHORT = ("steps=4", "batch_size=4", "validate_every=2", "others=2", "alternatives=1")
TRAINED = [
    # tests/knowledge/workflow/test_training.py kills trainings of liveedit; unike takes longest
    pytest.param(name, marks=_NIGHTLY if name in ("liveedit", "unike") else ())
    for name in registry.editors.names()
    if registry.editors.fact(name, "trains")
]


class Killed(BaseException):
    pass


def train(name, backbone, folder, tick=lambda _what, _n: None):
    """Train networks in a folder, as a command does; return the best ones."""
    cls = registry.editors.get(name)
    known = cls.Hparams().training
    short = tuple(
        f"training.{text}" for text in SHORT if hasattr(known, text.partition("=")[0])
    )
    editor = make(name, short, backbone, trained=False)
    cases = read_data(SHAPES).cases
    with Run.open(folder, {"run": "same"}, {}) as run:
        train_networks(editor, cases[:8], cases[8:11], run, Conditions(tick=tick))
    return load_file(folder / "editor.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_a_training_that_was_killed_ends_with_the_same_bits(name, tmp_path):
    backbone = load_backbone("tiny-llava", device="cpu")
    whole = train(name, backbone, tmp_path / "whole")
    steps = []

    def tick(what, n):
        if what == "steps":
            steps.append(n)
        if sum(steps) == 3:
            raise Killed

    with pytest.raises(Killed):
        train(name, backbone, tmp_path / "cut", tick)
    assert same_tensors(train(name, backbone, tmp_path / "cut"), whole)
