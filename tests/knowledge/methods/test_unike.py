"""unike: the invariants of both memories, of their collaboration, and of the scope."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import QUERIES, SHAPES
from safetensors.torch import load_file

from mmedit_cli import registry
from mmedit_cli.errors import HparamsError, MmeditError
from mmedit_cli.hparams import load_hparams
from mmedit_cli.knowledge.data.base import read_data
from mmedit_cli.knowledge.methods.unike.hparams import UnikeHparams, UnikeTraining
from mmedit_cli.knowledge.methods.unike.networks import (
    Scope,
    UnikeNetworks,
    attend,
    blend,
    semantic_loss,
    truth_loss,
)
from mmedit_cli.knowledge.methods.unike.training import gather, last
from mmedit_cli.knowledge.training_loop import Conditions, train_networks
from mmedit_cli.records import Run
from mmedit_cli.runtime import generator
from mmedit_cli.types import Query

REQUESTS = (
    Query("What is this?", "a blue star", SHAPES / "solid/red-circle.png"),
    Query("Which colour is it?", "green", SHAPES / "outlined/blue-cross.png"),
    Query("What is the capital of Peru?", "Cusco"),
)
WIDTH, LAYERS = 12, 3
MADE = []


@pytest.fixture(autouse=True)
def _taken_back():
    """A test that fails leaves the shared backbone as it was."""
    yield
    while MADE:
        MADE.pop().undo()


def make(backbone, *overrides):
    cls = registry.editors.get("unike")
    path = registry.hparams_file("unike")
    MADE.append(
        cls(
            backbone,
            load_hparams(path, cls.Hparams, variant=backbone.name, overrides=overrides),
        )
    )
    return MADE[-1]


def logits(backbone, queries=(*QUERIES, *REQUESTS)):
    with torch.no_grad():
        return [backbone.logits(backbone.batch([query])) for query in queries]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


# -- formulas ---------------------------------------------------------------------------------------------------------


def test_attention_over_knowledge_is_a_mixture_of_its_rows():
    states, known = rows(2, 5, WIDTH), rows(2, 7, WIDTH, seed=1)
    mixed = attend(states, known, 16.0)
    assert (mixed <= known.amax(1, keepdim=True) + 1e-6).all()
    assert (mixed >= known.amin(1, keepdim=True) - 1e-6).all()
    torch.testing.assert_close(
        attend(states, known[:, :1], 16.0), known[:, :1].expand(-1, 5, -1)
    )
    logits = torch.einsum("rtd,rkd->rtk", states, known)
    torch.testing.assert_close(attend(states, known, None), logits.softmax(-1) @ known)


def test_the_blend_turns_and_keeps_the_length():
    said, known = rows(2, 4, WIDTH), rows(2, 4, WIDTH, seed=1)
    assert torch.equal(blend(said, known, torch.zeros(2, 4)), said)
    whole = blend(said, known, torch.ones(2, 4))
    torch.testing.assert_close(F.normalize(whole, dim=-1), F.normalize(known, dim=-1))
    torch.testing.assert_close(whole.norm(dim=-1), said.norm(dim=-1))
    moves = [
        (blend(said, known, torch.full((2, 4), a)) - said).norm()
        for a in (0.1, 0.4, 0.9)
    ]
    assert moves[0] < moves[1] < moves[2]


def test_contrastive_losses_against_loops():
    right, wrong, sem = rows(4, WIDTH), rows(4, WIDTH, seed=1), rows(4, WIDTH, seed=2)
    codes = F.normalize(torch.cat((right, wrong)))
    terms = []
    for i in range(8):
        every = {j: (codes[i] @ codes[j] / 0.5).exp() for j in range(8) if j != i}
        terms.append(
            -(
                sum(v for j, v in every.items() if (j < 4) == (i < 4))
                / sum(every.values())
            ).log()
        )
    torch.testing.assert_close(truth_loss(right, wrong, 0.5), torch.stack(terms).mean())
    terms = []
    for i in range(4):
        near = [
            (F.normalize(sem[i], dim=0) @ F.normalize(h, dim=0) / 0.5).exp()
            for h in (*right, *wrong)
        ]
        terms.append(-((near[i] + near[4 + i]) / sum(near)).log())
    torch.testing.assert_close(
        semantic_loss(sem, right, wrong, 0.5), torch.stack(terms).mean()
    )
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        truth_loss(right[order], wrong[order], 0.5), truth_loss(right, wrong, 0.5)
    )
    torch.testing.assert_close(
        semantic_loss(sem, wrong, right, 0.5), semantic_loss(sem, right, wrong, 0.5)
    )
    apart = torch.zeros(4, WIDTH), torch.zeros(4, WIDTH)
    apart[0][:, 0] = apart[1][:, 1] = 1.0
    assert truth_loss(*apart, 0.01) < 1e-6


def test_the_direction_of_truthfulness():
    torch.manual_seed(0)
    networks = UnikeNetworks(
        WIDTH,
        UnikeHparams(
            layers=LAYERS, encoder_dim=8, truth_dim=4, scope_dim=8, heads=2, knowledge=4
        ),
    )
    base, lean = rows(LAYERS, 200, WIDTH), rows(LAYERS, 1, WIDTH, seed=1)
    networks.finalize(base + lean, base - lean)
    zeta, shift = networks.zeta.clone(), networks.shift.clone()
    assert (F.cosine_similarity(shift, lean[:, 0]) > 0.3).all()
    networks.finalize(base - lean, base + lean)
    torch.testing.assert_close(networks.zeta, -zeta)
    torch.testing.assert_close(networks.shift, -shift, atol=1e-5, rtol=1e-4)


def test_retrieval_equals_brute_force(backbone):
    editor = make(backbone, "top_k=5", "knowledge=8")
    width, layers = backbone.width, editor.hparams.layers
    for filled in (3, 8):
        sem, pos = rows(filled, width), rows(layers, filled, width, seed=1)
        editor.networks.know(sem, pos)
        query, of_edit, says = (
            rows(2, width, seed=2),
            rows(2, 1, width, seed=3),
            rows(2, 1, layers, width, seed=4),
        )
        found = editor._memories.recall(query, of_edit, says)
        for r in range(2):
            keys = torch.cat(
                (editor.networks.sem[:filled].double(), of_edit[r].double())
            )
            best = F.cosine_similarity(keys, query[r].double()[None]).argsort(
                descending=True
            )[:5]
            values = torch.cat(
                (editor.networks.pos[:, :filled].float(), says[r].transpose(0, 1)), 1
            )
            assert torch.equal(found[:, r], values[:, best])
        editor.networks.sem.mul_(2)
        assert torch.equal(editor._memories.recall(query, of_edit, says), found), (
            "length does not count"
        )


def test_the_last_marked_position():
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()
    assert last(mask).nonzero().tolist() == [[0, 2], [1, 0], [2, 4]]


def test_scope_tells_pictures_from_texts():
    torch.manual_seed(0)
    scope = Scope(WIDTH, 8, 2)
    hidden, prompt = rows(3, 6, WIDTH), torch.tensor([[0, 0, 0, 1, 1, 0]] * 3).bool()
    image = torch.tensor([[1, 1, 1, 0, 0, 0], [0] * 6, [1, 1, 0, 0, 0, 0]]).bool()
    features = scope(hidden, prompt, image)
    score = scope.score(features, features)
    assert score.isinf().tolist() == [
        [False, True, False],
        [True, False, True],
        [False, True, False],
    ]
    alone = torch.cat(
        [
            scope(hidden[i : i + 1], prompt[i : i + 1], image[i : i + 1])
            for i in range(3)
        ]
    )
    torch.testing.assert_close(alone, features)


# -- editing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["scoped", "reference"])
def test_beta_and_shares_of_nothing_are_the_ablated_model(backbone, mode):
    """Without a direction of truthfulness the collaboration of beta 0 is none; a share of 0 is no external memory."""
    if mode == "scoped":
        off = make(backbone, "threshold=-1000", "collaboration=false", "share=0.0")
        on = make(backbone, "threshold=-1000", "external=false", "beta=0.0")
        with off.edit(REQUESTS[:1]):
            expected = logits(backbone)
        with on.edit(REQUESTS[:1]):
            assert same(logits(backbone), expected)
    else:
        editor = make(
            backbone,
            "mode=reference",
            "intrinsic=false",
            "collaboration=false",
            "share=0.0",
        )
        base = logits(backbone)
        with editor.edit(REQUESTS[:1]):
            assert same(logits(backbone), base), "nothing is blended in"


def test_each_part_alone_changes_the_answer(backbone):
    base = logits(backbone, REQUESTS[:1])
    for off in ("intrinsic", "external", "collaboration"):
        editor = make(
            backbone,
            "threshold=-1000",
            f"{off}=false",
            *(("collaboration=false",) * (off == "intrinsic")),
        )
        with editor.edit(REQUESTS[:1]) as edited:
            assert not same(logits(backbone, REQUESTS[:1]), base), off
            assert bool(edited.info["losses"][0]) == (off != "intrinsic")
    with pytest.raises(ValueError, match="nothing is left"):
        UnikeHparams(intrinsic=False, external=False)


def test_out_of_scope_not_a_bit_changes_in_logits_and_generation(backbone):
    editor, base = make(backbone, "threshold=1000"), logits(backbone)
    texts = backbone.generate(QUERIES, max_new_tokens=4)
    editor.edit(REQUESTS)
    assert same(logits(backbone), base)
    assert backbone.generate(QUERIES, max_new_tokens=4) == texts
    assert editor.affects(QUERIES) == [False] * len(QUERIES)
    editor.undo()


def test_an_edit_of_a_picture_never_touches_a_text_and_the_reverse(backbone):
    editor = make(backbone, "threshold=-1000")
    for requests in (REQUESTS[:1], REQUESTS[2:]):
        with editor.edit(requests):
            seeing = requests[0].image is not None
            assert editor.affects(QUERIES) == [
                (query.image is not None) == seeing for query in QUERIES
            ]


@pytest.mark.parametrize("mode", ["scoped", "reference"])
def test_one_request_is_learned_in_few_steps(backbone, mode):
    editor = make(backbone, "threshold=-1000", f"mode={mode}")
    losses = editor.edit(REQUESTS[:1]).info["losses"][0]
    assert losses[-1] < losses[0] - 1.5
    assert all(
        p.grad is None and not p.requires_grad for p in backbone.model.parameters()
    )
    editor.undo()


def test_scoped_edits_do_not_depend_on_each_other(backbone):
    """In whatever order, and with one taken out of the middle: the same bits (fitted alone)."""
    editor = make(backbone, "steps=3", "threshold=-1000")
    ids = [editor.edit([request]).ids[0] for request in REQUESTS]
    editor.undo(ids[:1])
    kept = editor.state()[0]
    editor.undo()
    for i in (1, 2):
        editor._next_id = ids[i]
        editor.edit(REQUESTS[i : i + 1])
    assert all(
        torch.equal(kept[name], tensor) for name, tensor in editor.state()[0].items()
    )
    editor.undo()


def test_a_batch_of_edits_equals_edits_one_by_one(backbone):
    """Each has its own neurons, its own clipping and its own end; only the noise of the start is drawn in a row."""
    editor = make(backbone, "steps=4", "neurons=1")
    editor._initial = without_noise(editor)
    editor.edit(REQUESTS[:2])
    together = editor.state()[0]
    editor.undo()
    for request in REQUESTS[:2]:
        editor.edit([request])
    for name, tensor in editor.state()[0].items():
        torch.testing.assert_close(tensor, together[name], atol=2e-3, rtol=1e-3)
    editor.undo()


def without_noise(editor):
    real = type(editor)._initial

    def initial(prefix, edits, at, _source):
        return (
            real(editor, prefix, edits, at, generator(0))
            if len(at) == 1
            else torch_cat(
                [
                    real(
                        editor,
                        editor.backbone.select(prefix, [i]),
                        {k: v[i : i + 1] for k, v in edits.items()},
                        at[i : i + 1, : prefix.batch.lengths[i]],
                        generator(0),
                    )
                    for i in range(len(at))
                ]
            )
        )

    return initial


def torch_cat(parts):
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_rows_of_a_batch_get_what_they_get_alone(backbone):
    editor = make(backbone, "threshold=-1000", "steps=3")
    editor.edit(REQUESTS)
    batch = backbone.batch(REQUESTS)
    with torch.no_grad():
        together = backbone.logits(batch)
    for row, (alone, length) in enumerate(
        zip(logits(backbone, REQUESTS), batch.lengths, strict=True)
    ):
        torch.testing.assert_close(
            together[row, :length], alone[0], atol=1e-4, rtol=1e-4
        )
    editor.undo()


def test_generation_says_what_the_forward_pass_says(backbone):
    editor = make(backbone, "threshold=-1000")
    editor.edit(REQUESTS[:1])
    (said,) = backbone.generate(REQUESTS[:1], max_new_tokens=4)
    if said:
        batch = backbone.batch([replace(REQUESTS[0], target=said)])
        assert (
            backbone.logits(batch)[batch.predicting].argmax(-1) == batch.answers
        ).all()
    with pytest.raises(MmeditError, match="ask the backbone"):
        backbone.layers[editor.first_layer](torch.zeros(1, 2, backbone.width))
    editor.undo()


def test_an_edit_that_repeats_another_hides_it(backbone):
    editor = make(backbone, "threshold=-1000", "steps=2")
    editor.edit(REQUESTS[:1])
    again = editor.edit([Query(REQUESTS[0].prompt, "green", REQUESTS[0].image)])
    batch = backbone.batch(REQUESTS[:1])
    hidden = backbone.prefix(batch, editor.first_layer).hidden
    assert editor.about(hidden, batch).tolist() == [1]
    editor.undo(again.ids)
    assert editor.about(hidden, batch).tolist() == [0]
    editor.undo()


def test_reference_keeps_the_neurons_of_all_edits_and_no_scope(backbone):
    editor = make(backbone, "mode=reference", "steps=2")
    for count, request in enumerate(REQUESTS, 1):
        editor.edit([request])
        assert editor.state()[0]["bias"].shape == (
            count,
            editor.hparams.layers,
            editor.hparams.neurons,
        )
    assert editor.affects(QUERIES) == [True] * len(QUERIES)
    assert editor.calibrated == {}
    editor.undo()


# -- training --------------------------------------------------------------------------------------------------


def test_knowledge_is_what_the_model_gets_wrong(backbone):
    cases = read_data(SHAPES).cases[:3]
    own = backbone.generate([cases[0].request], max_new_tokens=16)[0]
    triples = gather(backbone, cases, 3)
    assert (cases[0].uid in triples.place) == bool(own), "no answer is no wrong answer"
    assert (
        triples.pos.shape
        == triples.neg.shape
        == (3, len(triples.place), backbone.width)
    )
    if own:
        assert not torch.equal(triples.pos, triples.neg)
        right = replace(cases[0], request=replace(cases[0].request, target=own.upper()))
        assert gather(backbone, [right], 3).place == {}


def test_training_and_what_it_leaves(backbone, tmp_path):
    if backbone.name != "tiny-blip2":
        pytest.skip("one family is enough")
    cases = read_data(SHAPES).cases
    short = (
        "training.steps=6",
        "training.batch_size=4",
        "training.validate_every=3",
        "steps=3",
        "training.others=2",
    )
    kept = []
    for folder in ("a", "b"):
        editor, said = make(backbone, *short), []
        with Run.open(tmp_path / folder, {"run": folder}, {}) as run:
            report = train_networks(
                editor, cases[:8], cases[8:11], run, Conditions(say=said.append)
            )
        kept.append(load_file(tmp_path / folder / "editor.safetensors"))
    assert said[0].startswith("knowledge: ")
    assert set(report["calibrated"]) == {"threshold"}
    assert {"truth", "semantic", "scope", "total"} <= set(
        report["losses"][-1]["losses"]
    )
    assert all(torch.equal(kept[0][key], kept[1][key]) for key in kept[0])
    assert int(kept[0]["rows"]) == len(editor._triples.place) > 0
    assert kept[0]["shift"].abs().sum() > 0
    fresh = make(backbone, *short)
    fresh.load_networks(tmp_path / "a" / "editor.safetensors")
    assert torch.equal(fresh.networks.pos, kept[0]["pos"])


def test_bad_values_are_explained(backbone):
    for wrong in ({"layers": 0}, {"share": 1.5}, {"scope_dim": 9}, {"top_k": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            UnikeHparams(**wrong)
    with pytest.raises(ValueError, match="batch_size"):
        UnikeTraining(batch_size=1)
    with pytest.raises(HparamsError, match="layers 9"):
        make(backbone, "layers=9")
