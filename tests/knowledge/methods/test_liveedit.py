"""The invariants of LiveEdit that are its own; those every editor shares are in test_editor_contract.py."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import QUERIES, SHAPES
from test_editor_contract import REQUESTS, logits, make

from mmedit_cli.eight_bits import to_eight_bits
from mmedit_cli.errors import DataError, HparamsError, MmeditError, StateError
from mmedit_cli.knowledge.methods.liveedit import refining
from mmedit_cli.knowledge.methods.liveedit.experts import (
    BLOCK,
    ExpertBank,
    adapt,
    choose,
    soft_weights,
)
from mmedit_cli.knowledge.methods.liveedit.training import (
    LOCALITY,
    Draws,
    Items,
    Place,
    _absolute,
    _joint_routing,
    choose_items,
    draw,
    losses_of,
)
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.runtime import generator
from mmedit_cli.types import EditCase, Query

FAR = Query("What is this?", "a shape", SHAPES / "solid/blue-star.png")
CASES = [
    EditCase(
        f"case{i}",
        request,
        {"text": (replace(request, prompt=f"Say: {request.prompt}"),)},
        {"far": (FAR,)},
    )
    for i, request in enumerate(REQUESTS)
]


@pytest.fixture(scope="module", params=["tiny-blip2", "tiny-llava"])
def backbone(request):
    return load_backbone(request.param, device="cpu")


PAPER = ("variant=paper",)


@pytest.fixture(
    params=[
        pytest.param((), id="joint"),
        pytest.param(PAPER, id="paper", marks=pytest.mark.slow),
    ]
)
def editor(request, backbone):
    made = make("liveedit", request.param, backbone)
    yield made
    made.undo()


def answers(backbone, queries):
    batch = backbone.batch(queries)
    with torch.no_grad():
        return backbone.logits(batch)[batch.predicting]


# -- routing ------------------------------------------------------------------------------------------------------


def test_where_no_expert_is_chosen_not_a_bit_changes(editor):
    base = logits(editor.backbone)
    editor.hparams = replace(editor.hparams, margin=1e9)
    editor.edit(REQUESTS)
    assert torch.equal(logits(editor.backbone), base)
    assert editor.affects(REQUESTS) == [False] * 3


def test_text_alone_is_never_touched(editor):
    query = Query("Which city is the capital of Peru?", "Lima")
    before = answers(editor.backbone, [query])
    editor.edit(REQUESTS)
    assert torch.equal(answers(editor.backbone, [query]), before)
    assert editor.affects([query, REQUESTS[0]])[0] is False


def test_what_touches_says_is_what_changes(editor):
    queries = [*REQUESTS, *QUERIES, FAR]
    before = [answers(editor.backbone, [query]) for query in queries]
    editor.edit(REQUESTS[:1])
    changed = [
        not torch.equal(answers(editor.backbone, [q]), b)
        for q, b in zip(queries, before, strict=True)
    ]
    assert editor.affects(queries) == changed
    assert True in changed
    assert False in changed


def test_batched_equals_single_in_the_edited_model(editor):
    editor.edit(REQUESTS)
    together = answers(editor.backbone, [*QUERIES, *REQUESTS])
    alone = torch.cat(
        [answers(editor.backbone, [query]) for query in (*QUERIES, *REQUESTS)]
    )
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_an_expert_that_is_not_chosen_changes_no_bit(editor):
    editor.edit(REQUESTS[:1])
    before = answers(editor.backbone, REQUESTS[:1])
    rows = {
        name: tensor[:1].expand(BLOCK, *tensor.shape[1:])
        for name, tensor in editor._bank.tensors().items()
    }
    rows |= {
        "vision": -50 * rows["vision"]
    }  # far below any threshold where the first one is above
    others = [Query(f"Other question {i}?", "x", FAR.image) for i in range(BLOCK)]
    editor._add(rows, others)
    assert len(editor._bank) == BLOCK + 1, "also over the border of a block"
    assert torch.equal(answers(editor.backbone, REQUESTS[:1]), before)


def test_the_threshold_is_strict_and_raising_it_adds_nothing():
    score = torch.tensor([[0.5, 0.0, -0.5, 1.0]])
    for threshold, kept in ((0.0, [0, 3]), (-0.5, [0, 1, 3]), (0.5, [3]), (1.0, [])):
        assert choose(score > threshold, score, None, gated=True).index.tolist() == [
            kept
        ]


def test_weights():
    score = torch.tensor([[0.0, torch.log(torch.tensor(3.0))]])
    keep = torch.tensor([[True, True]])
    torch.testing.assert_close(
        soft_weights(score, keep, gated=True), torch.tensor([[0.125, 0.5625]])
    )
    torch.testing.assert_close(
        soft_weights(score, keep, gated=False), torch.tensor([[0.2, 0.6]])
    )  # 1, 3 and none: 1
    source = generator(0)
    score, keep = (
        4 * torch.randn(50, 7, generator=source),
        torch.rand(50, 7, generator=source) < 0.4,
    )
    for gated in (True, False):
        weights = soft_weights(score, keep, gated=gated)
        assert ((weights > 0) == keep).all()
        assert (weights.sum(1) < 1).all()
        assert torch.equal(
            weights[~keep.any(1)], torch.zeros_like(weights[~keep.any(1)])
        )
        single = soft_weights(
            score[:, :1], torch.ones(50, 1, dtype=torch.bool), gated=gated
        )
        torch.testing.assert_close(single, score[:, :1].sigmoid())
    best = choose(keep, score, 1, gated=False)
    assert best.index.shape[1] == 1
    assert torch.equal(
        best.index[keep.any(1)][:, 0],
        score.masked_fill(~keep, -99).argmax(1)[keep.any(1)],
    )


def test_the_residual():
    source = generator(1)
    stream, u, v = (
        torch.randn(size, generator=source)
        for size in ((2, 5, 8), (2, 3, 4, 8), (2, 3, 4, 8))
    )
    weight = torch.rand(2, 3, generator=source)
    one_by_one = stream.clone()
    for row in range(2):
        for i in range(3):
            one_by_one[row] += (
                weight[row, i] * (stream[row] @ u[row, i].T).relu() @ v[row, i]
            )
    torch.testing.assert_close(
        adapt(stream, stream, u, v, weight), one_by_one, atol=1e-5, rtol=1e-5
    )
    twice = adapt(stream, stream, u, 2 * v, weight) - stream
    torch.testing.assert_close(
        twice, 2 * (adapt(stream, stream, u, v, weight) - stream), atol=1e-5, rtol=1e-5
    )
    assert torch.equal(adapt(stream, stream, u, 0 * v, weight), stream)
    assert torch.equal(adapt(stream, stream, 0 * u, v, weight), stream)
    same = adapt(stream[:1], stream[:1], u[:1], v[:1], weight[:1])
    torch.testing.assert_close(
        adapt(stream[:1], stream[:1], u[0], v[0], weight[:1]), same
    )


def test_the_answer_that_is_fed_in_does_not_change_the_routing(editor):
    editor.edit(REQUESTS)
    backbone = editor.backbone
    for with_answer in (True, False):
        batch = backbone.batch(REQUESTS, with_answer=with_answer)
        _, routing = editor.route(
            backbone.prefix(batch, editor.first_layer).hidden, batch
        )
        if with_answer:
            expected = routing
    assert torch.equal(routing.index, expected.index)
    torch.testing.assert_close(routing.weight, expected.weight, atol=1e-5, rtol=0)


def test_generation_with_the_cache_is_greedy_decoding_without_it(editor):
    """The routing of the question holds for every generated token: with it fixed, a full pass says the same."""
    editor.edit(REQUESTS)
    backbone = editor.backbone
    bare = [replace(request, target="") for request in REQUESTS]
    texts = backbone.generate(bare, max_new_tokens=5)
    assert texts != _without_edits(editor, bare)
    for query, text in zip(bare, texts, strict=True):
        batch = backbone.batch([query], with_answer=False)
        start = batch.input_ids.shape[1]
        for _ in range(5):
            with torch.no_grad():
                token = backbone.logits(batch)[:, -1:].argmax(-1)
            batch = replace(
                batch,
                input_ids=torch.cat((batch.input_ids, token), 1),
                attention_mask=torch.nn.functional.pad(
                    batch.attention_mask, (0, 1), value=1
                ),
                image_mask=torch.nn.functional.pad(batch.image_mask, (0, 1)),
                prompt_mask=torch.nn.functional.pad(batch.prompt_mask, (0, 1)),
            )
        assert text == backbone.decode(batch.input_ids[0, start:].tolist())


def _without_edits(editor, queries):
    state = editor.state()
    editor.undo()
    texts = editor.backbone.generate(queries, max_new_tokens=5)
    editor.load_state(*state)
    return texts


def test_a_model_that_is_called_past_the_backbone_is_refused(editor):
    editor.edit(REQUESTS[:1])
    with pytest.raises(MmeditError, match="ask the backbone"):
        editor.backbone.model.get_submodule(editor.backbone.anchors.stack)(
            inputs_embeds=torch.zeros(1, 3, editor.backbone.width)
        )


# -- the repository -----------------------------------------------------------------------------------------------


def test_an_expert_does_not_depend_on_earlier_edits_and_the_order_does_not_matter(
    editor,
):
    editor.edit(REQUESTS[2:])
    alone = editor._bank.tensors()
    editor.undo()
    for request in REQUESTS:
        editor.edit([request])
    rows = editor._bank.tensors()
    assert all(torch.equal(rows[name][2], alone[name][0]) for name in rows)
    forward = logits(editor.backbone)
    editor.undo()
    editor.edit(REQUESTS[::-1])
    torch.testing.assert_close(logits(editor.backbone), forward, atol=1e-5, rtol=0)


def test_undo_of_one_edit_makes_no_other_again(editor, monkeypatch):
    ids = [editor.edit([request]).ids[0] for request in REQUESTS]
    rows = editor._bank.tensors()
    monkeypatch.setattr(editor, "_apply", None)
    editor.undo(ids[1:2])
    assert editor.requests == [REQUESTS[0], REQUESTS[2]]
    left = editor._bank.tensors()
    assert all(torch.equal(left[name], rows[name][[0, 2]]) for name in rows)


def test_the_newest_edit_of_the_same_picture_and_prompt_wins_until_it_is_undone(editor):
    backbone = editor.backbone
    editor.edit(REQUESTS[:1])
    once = answers(backbone, REQUESTS[:1])
    other = replace(REQUESTS[0], target="a green ring")
    newer = editor.edit([other])
    edited = answers(backbone, [other])
    editor.undo(newer.ids)
    assert torch.equal(answers(backbone, REQUESTS[:1]), once)
    editor.undo()
    editor.edit([other])
    torch.testing.assert_close(answers(backbone, [other]), edited, atol=1e-6, rtol=0)


def test_many_experts_are_kept_in_order_and_grow(backbone):
    bank = ExpertBank(
        {"u": (1, 2), "v": (1, 2), "vision": (3,), "prompt": (3,)}, torch.device("cpu")
    )
    for start in range(0, 3 * BLOCK, 100):
        numbers = torch.arange(start, start + 100).float()
        bank.add(
            {
                "u": numbers.view(-1, 1, 1).expand(-1, 1, 2),
                "v": torch.zeros(100, 1, 2),
                "vision": numbers[:, None].expand(-1, 3),
                "prompt": torch.zeros(100, 3),
            }
        )
    assert bank.tensors()["u"][:, 0, 0].tolist() == list(range(len(bank)))
    assert bank.compare("vision", lambda block: block.sum(1)[None])[0].tolist() == [
        3 * i for i in range(len(bank))
    ]


# -- wrong input --------------------------------------------------------------------------------------------------


def test_a_request_without_a_picture_is_refused(editor):
    with pytest.raises(DataError, match="every request needs an image"):
        editor.edit([Query("What is the capital of Peru?", "Oslo")])
    assert editor.operations == []


def test_a_layer_that_is_not_there_is_named(backbone):
    with pytest.raises(
        HparamsError, match=r"edit_layer 21: tiny-\w+ has the layers 0 to 5"
    ):
        make("liveedit", ("edit_layer=21",), backbone)
    with pytest.raises(HparamsError, match=r"heads 5: must divide the width 48"):
        type(make("liveedit", (), backbone))(backbone, _with_heads(backbone, 5))


def _with_heads(backbone, heads):
    return replace(
        make("liveedit", (), backbone).hparams, heads=heads, module_dim=heads * 4
    )


def test_networks_of_another_model_or_shape_are_refused(editor, backbone, tmp_path):
    from safetensors.torch import save_file

    tensors, metadata = editor.networks_state()
    path = tmp_path / "networks.safetensors"
    for wrong, message in (
        ({"model": "other"}, "trained for model other"),
        ({"networks": "{}"}, "trained for networks"),
    ):
        save_file(tensors, path, {**metadata, **wrong})
        with pytest.raises(StateError, match=message):
            editor.load_networks(path)
    save_file(dict(list(tensors.items())[1:]), path, metadata)
    with pytest.raises(StateError, match="does not fit"):
        editor.load_networks(path)


def test_files_from_before_a_hyper_parameter_that_is_null_are_read(editor, tmp_path):
    from safetensors.torch import save_file

    def former(metadata, key):
        values = json.loads(metadata[key])
        del values["naming"]
        return {**metadata, key: json.dumps(values)}

    tensors, metadata = editor.networks_state()
    path = tmp_path / "networks.safetensors"
    save_file(tensors, path, former(metadata, "networks"))
    editor.load_networks(path)
    editor.edit(REQUESTS[:1])
    tensors, metadata = editor.state()
    editor.load_state(tensors, former(metadata, "hparams"))
    assert editor.requests == list(REQUESTS[:1])


def test_networks_in_eight_bits_are_nearly_the_same(editor, backbone, tmp_path):
    from mmedit_cli.storage import write_tensors

    tensors, metadata = editor.networks_state()
    path = tmp_path / "networks.safetensors"
    write_tensors(path, to_eight_bits(tensors), metadata)
    with torch.no_grad():
        for parameter in editor.networks.parameters():
            parameter.zero_()
    editor.load_networks(path)
    found = editor.networks.state_dict()
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        largest = value.abs().max()
        assert ((found[name] - value).abs() <= 0.006 * largest).all(), name


# -- refining ------------------------------------------------------------------------------------------------------


def test_an_expert_that_misses_is_refined(backbone):
    request, heard = replace(REQUESTS[0], target="a red balloon"), {}
    for steps in (0, 10, 40):
        overrides = (f"refine={steps}", "margin=-100")
        editor = make("liveedit", overrides, backbone, trained=False)
        with editor.edit([request]):
            told = answers(backbone, [request]).log_softmax(-1)
            heard[steps] = told.gather(
                1, backbone.batch([request]).answers[:, None]
            ).sum()
    assert heard[0] < heard[10] < heard[40]


def test_what_says_its_answer_is_left_to_the_bit(backbone, monkeypatch):
    rows = {}
    for sure in (0.0, 0.9):  # from what probability on a token counts as said
        monkeypatch.setattr(refining, "_SURE", sure)
        for steps in (0, 5):
            with make("liveedit", (f"refine={steps}",), backbone).edit(
                REQUESTS
            ) as edited:
                rows[sure, steps] = edited.editor.tensors()
    assert all(
        torch.equal(rows[0.0, 0][name], rows[0.0, 5][name]) for name in rows[0.0, 0]
    )
    for name, expert in rows[0.9, 5].items():
        assert torch.equal(rows[0.9, 0][name], expert) == (name not in "uv")


def test_refinement_stops_where_every_token_is_said(backbone, monkeypatch):
    """One look before the first step and one a step; after the one that finds the answer nothing else is done."""
    measured, looks = refining._log_probabilities, []

    def look(*arguments):
        said = measured(*arguments)
        looks.append(said)
        probability = refining._SURE + 0.01 if len(looks) == 4 else 0.5
        return 0 * said + math.log(probability)

    monkeypatch.setattr(refining, "_log_probabilities", look)
    editor = make("liveedit", ("refine=50",), backbone, trained=False)
    editor.edit(REQUESTS[:1])
    editor.undo()
    assert len(looks) == 4


def test_the_absolute_loss_by_hand():
    """Of n experts n - 1 are others: their mean counts as much as the own one."""
    even = torch.zeros(3, 3)  # each is as likely as not
    assert float(_absolute(even, "correct")) == pytest.approx(2 * math.log(2), rel=1e-5)
    table = even + torch.diag(torch.full((3,), 2.0))
    own = math.log(1 + math.exp(-2.0))
    wanted = own + math.log(2)
    assert float(_absolute(table, "correct")) == pytest.approx(wanted, rel=1e-5)


# -- training -----------------------------------------------------------------------------------------------------


def steps(editor, count, **how):
    editor.networks.requires_grad_(True)
    optimizer = torch.optim.Adam(editor.networks.parameters(), lr=1e-3)
    losses = []
    for step in range(count):
        optimizer.zero_grad()
        losses.append(editor.losses(CASES, generator(step), **how))
        losses[-1]["total"].backward()
        optimizer.step()
    editor.networks.requires_grad_(False)
    return losses


def test_training_reaches_every_network_and_nothing_else(editor):
    before = {
        name: tensor.clone()
        for name, tensor in editor.backbone.model.state_dict().items()
    }
    steps(editor, 1)
    for name, parameter in editor.networks.named_parameters():
        assert parameter.grad is not None, name
        assert (
            not name.endswith("k.bias") or parameter.grad.abs().max() < 1e-5
        )  # a softmax does not see it
        assert name.endswith("k.bias") or parameter.grad.abs().max() > 0, name
    for name, tensor in editor.backbone.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None for p in editor.backbone.model.parameters())


def test_a_step_on_kept_prefixes_is_the_step_without(editor):
    plain = steps(editor, 1)[0]
    gradients = {name: p.grad.clone() for name, p in editor.networks.named_parameters()}
    form = () if editor.hparams.variant == "joint" else PAPER
    again = make("liveedit", form, editor.backbone)
    queries = [q for case in CASES for _, qs in case.columns() for q in qs]
    with editor.backbone.cached_activations(
        editor.first_layer, queries, group=4, budget=1 << 30
    ):
        kept = steps(again, 1)[0]
    for name, value in plain.items():
        torch.testing.assert_close(kept[name], value, atol=1e-5, rtol=1e-5)
    for name, parameter in again.networks.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], atol=1e-5, rtol=1e-3
        )


@pytest.mark.parametrize("compat", ["correct", "reference"])
def test_no_allowed_expert_means_no_locality_loss(backbone, compat):
    editor = make("liveedit", (f"training.compat={compat}",), backbone, trained=False)
    items = choose_items(CASES, generator(0))
    drawn = draw(items, generator(0), compat)
    allowed = drawn.allowed & (items.code != LOCALITY)[:, None]
    losses = losses_of(
        editor.networks,
        Place(backbone, editor.first_layer),
        items,
        Draws(allowed, drawn.neighbour, drawn.sentinel),
    )
    assert losses["locality"] == 0


def test_an_expert_that_says_the_same_is_no_wrong_choice():
    """Sequences: two requests, and a locality query of the first; experts: theirs, and two of edits beside them."""
    items = Items((), torch.tensor([0, 1, 0]), torch.tensor([0, 0, LOCALITY]), ())
    score = torch.tensor(
        [[1.0, 0.0, 9.0, 0.5], [0.2, 2.0, 0.3, 0.1], [0.4, 0.6, 9.0, 0.7]]
    )
    loss = _joint_routing(items, score, ["lion", "pear", "lion", "car"])
    told = (
        torch.tensor([1.0, 0.0, 0.5, 0.0]).log_softmax(0)[
            0
        ]  # the third says lion as well; the last is "none"
        + torch.tensor([0.2, 2.0, 0.3, 0.1, 0.0]).log_softmax(0)[1]
        + torch.tensor([0.4, 0.6, 9.0, 0.7, 0.0]).log_softmax(0)[
            4
        ]  # where no edit is to answer, all are wrong
    )
    torch.testing.assert_close(loss, -told / 3)


def test_the_shares_of_two_processes_add_up(editor):
    whole = steps(editor, 1)[0]
    gradients = {name: p.grad.clone() for name, p in editor.networks.named_parameters()}
    total, sums = 0.0, dict.fromkeys(gradients, 0.0)
    for rank in range(2):
        form = () if editor.hparams.variant == "joint" else PAPER
        part = make("liveedit", form, editor.backbone)
        total += steps(part, 1, rank=rank, world=2)[0]["total"]
        for name, parameter in part.networks.named_parameters():
            sums[name] = sums[name] + parameter.grad
    torch.testing.assert_close(total, whole["total"], atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(sums[name], gradient, atol=1e-5, rtol=1e-3)


def test_pools_and_pairs_are_drawn_from_what_there_is():
    cases = [
        *CASES,
        EditCase(
            "bare", REQUESTS[0], {}, {"far": (FAR,), "text": (Query("Peru?", "Lima"),)}
        ),
    ]
    for compat in ("correct", "reference"):
        for step in range(20):
            items = choose_items(cases, generator(step))
            assert items.code.tolist() == [0] * 4 + [1] * 3 + [LOCALITY] * 4
            drawn = draw(items, generator(step), compat)
            own = torch.zeros_like(drawn.allowed).scatter(1, items.case[:, None], True)
            assert drawn.allowed[own & (items.code != LOCALITY)[:, None]].all()
            for a, b in (drawn.neighbour, drawn.sentinel):
                assert torch.equal(items.case[a], torch.arange(4))
                assert torch.equal(items.case[b], torch.arange(4))
            a, b = drawn.neighbour
            assert torch.equal(items.code[a] == LOCALITY, items.code[b] == LOCALITY)
            a, b = drawn.sentinel
            assert ((items.code[a] == LOCALITY) ^ (items.code[b] == LOCALITY)).all()
    with pytest.raises(DataError, match="has no locality query with a picture"):
        choose_items(
            [EditCase("x", REQUESTS[0], {}, {"text": (Query("Peru?", "Lima"),)})],
            generator(0),
        )


def test_every_query_that_must_stay_can_take_part():
    near = replace(FAR, prompt="Say what this is.")
    cases = [
        replace(
            case,
            locality={
                "far": (FAR, near),
                "near": (near,),
                "text": (Query("And?", "no"),),
            },
        )
        for case in CASES
    ]
    drawn = choose_items(cases, generator(0))
    assert (drawn.code == LOCALITY).sum() == len(cases)
    whole = choose_items(cases, generator(0), locality="all")
    stays = [
        (whole.case[i].item(), whole.queries[i])
        for i in (whole.code == LOCALITY).nonzero()[:, 0].tolist()
    ]
    assert stays == [
        (i, query) for i in range(len(cases)) for query in (FAR, near, near)
    ]
    assert whole.queries[: len(cases)] == tuple(case.request for case in cases)
