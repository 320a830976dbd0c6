"""memit and alphaedit: their regressions against the published systems, what stays, and where keys are read."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import QUERIES, SHAPES

from mmedit_cli.errors import DataError, HparamsError, StateError
from mmedit_cli.knowledge.covariance import default_path, ffn_moments
from mmedit_cli.knowledge.methods.alphaedit import (
    Alphaedit,
    AlphaeditHparams,
    null_space,
)
from mmedit_cli.knowledge.methods.memit import Memit, MemitHparams
from mmedit_cli.knowledge.methods.shared.hidden_targets import (
    Lesson,
    TargetTraining,
    hidden_targets,
    states_at,
)
from mmedit_cli.knowledge.methods.shared.key_positions import key_places, key_positions
from mmedit_cli.knowledge.methods.shared.losses import answer_loss
from mmedit_cli.knowledge.methods.shared.ridge import KeptKeys
from mmedit_cli.knowledge.methods.shared.side_effects import unrelated_questions
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.patch import Patch
from mmedit_cli.runtime import generator
from mmedit_cli.types import Query

REQUEST = Query("What is this?", "a blue star", SHAPES / "solid/red-circle.png")
FACT = Query("What is the capital of Peru?", "Lima")
TARGET = TargetTraining(steps=8, learning_rate=0.3, clamp=4.0)


def rows(count, width, seed=0):
    return torch.randn(count, width, generator=generator(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def model():
    return load_backbone("tiny-blip2", device="cpu")


# -- the algebra --------------------------------------------------------------------------------


def test_the_change_in_the_null_space_solves_the_published_system():
    """(P (K'K + C) + L I) X = P K'R, with C of the earlier edits (AlphaEdit, eq. 14)."""
    everything = rows(4, 10, 3)
    moment = everything.T @ everything / 4
    earlier, keys, values = rows(2, 10, 1), rows(3, 10), rows(3, 6, 2)
    basis = null_space(moment, 1e-6)
    projector = basis @ basis.T
    system = projector @ (keys.T @ keys + earlier.T @ earlier) + 10 * torch.eye(10)
    expected = torch.linalg.solve(system, projector @ keys.T @ values)
    kept = KeptKeys.of(10 * torch.eye(basis.shape[1]))
    kept.remember(earlier @ basis)
    found = basis @ kept.ridge(keys @ basis, values)
    assert torch.allclose(found, expected, atol=1e-12)
    assert (everything @ found).abs().max() < 1e-12, "what is kept stays"


def test_the_change_of_memit_solves_the_published_system():
    """(15000 C + K'K) X = K'R (MEMIT, eq. 14)."""
    moment = rows(40, 10, 3).T @ rows(40, 10, 3) / 40
    keys, values = rows(3, 10), rows(3, 6, 2)
    expected = torch.linalg.solve(15000 * moment + keys.T @ keys, keys.T @ values)
    found = KeptKeys.of(15000 * moment).ridge(keys, values)
    assert torch.allclose(found, expected, atol=1e-12)


def test_a_threshold_below_every_eigenvalue_preserves_everything():
    with pytest.raises(DataError, match="everything is preserved"):
        null_space(torch.eye(4).double(), 0.5)
    assert null_space(torch.eye(4).double(), 1.5, relative=True).shape == (4, 4)


# -- moments --------------------------------------------------------------------------------


def naive_moment(model, layer, rule):
    path = model.anchors.path("ffn_out", layer)
    found = []
    for query in QUERIES:
        batch = model.batch([query])
        with Patch(model.model) as patch, torch.no_grad():
            patch.hook_input(
                path, lambda entering: found.append(entering.flatten(0, -2))
            )
            model.logits(batch)
        if rule == "predicting":
            at = batch.predicting | batch.ends
            found[-1] = found[-1][at[0]]
    inputs = torch.cat(found).double()
    return inputs.T @ inputs / len(inputs), len(inputs)


@pytest.mark.parametrize("rule", ["all", "predicting"])
def test_moments_are_those_of_single_questions(model, tmp_path, rule):
    path = tmp_path / "moments.safetensors"
    found = ffn_moments(model, QUERIES, [1, 2], rule, path=path)
    for layer in (1, 2):
        expected, tokens = naive_moment(model, layer, rule)
        assert found.tokens == tokens
        assert torch.allclose(found.matrices[layer].double(), expected, atol=1e-5)


def test_moments_are_computed_once_and_layers_are_added(model, tmp_path):
    path = tmp_path / "moments.safetensors"
    ticks: list[int] = []
    first = ffn_moments(model, QUERIES, [1], path=path, tick=ticks.append)
    assert sum(ticks) == len(QUERIES)
    ffn_moments(model, QUERIES, [1], path=path, tick=ticks.append)
    assert sum(ticks) == len(QUERIES)
    both = ffn_moments(model, QUERIES, [1, 2], path=path, tick=ticks.append)
    assert sum(ticks) == 2 * len(QUERIES)
    assert torch.equal(both.matrices[1], first.matrices[1])
    ffn_moments(model, QUERIES[:2], [1], path=path, tick=ticks.append)
    assert sum(ticks) == 2 * len(QUERIES) + 2, "other questions, other moments"


def test_a_file_of_something_else_is_refused(model, tmp_path):
    from mmedit_cli.storage import write_tensors

    path = tmp_path / "moments.safetensors"
    write_tensors(path, {"1": torch.eye(2)}, {"format": "99"})
    with pytest.raises(StateError, match="no moments of format 1"):
        ffn_moments(model, QUERIES, [1], path=path)
    assert default_path(model, "all") != default_path(model, "predicting")


# -- where keys are read --------------------------------------------------------------------------------


def test_keys_are_read_where_the_position_says(backbone):
    batch = backbone.batch([REQUEST, replace_target(REQUEST, "green")])
    for row in range(2):
        image = batch.image_mask[row].nonzero()[:, 0]
        prompt = batch.prompt_mask[row].nonzero()[:, 0]
        assert key_positions(backbone, batch, "last-image")[row] == image[-1]
        last = key_positions(backbone, batch, "last-prompt")[row]
        assert last == prompt[-1]
        assert batch.predicting[row, last]
    text = backbone.batch([FACT])
    place = int(key_positions(backbone, text, "subject")[0])
    said = backbone.tokenizer.decode(text.input_ids[0, : place + 1])
    assert said.strip().endswith("Peru")
    with pytest.raises(DataError, match="last-image needs a picture"):
        key_positions(backbone, text, "last-image")


def test_every_token_of_the_answer_that_predicts_has_a_key(backbone):
    batch = backbone.batch([REQUEST, replace_target(REQUEST, "green")])
    with_end = batch.predicting | batch.ends
    for said in (batch.predicting, with_end):
        places = key_places(backbone, batch, "last-prompt", said)
        assert torch.equal(places, said), "the end of the question predicts too"
        behind = key_places(backbone, batch, "last-image", said)
        assert torch.equal(behind & batch.answer_mask, said & batch.answer_mask)
        assert (behind & batch.image_mask).sum(1).tolist() == [1, 1]
    alone = key_places(backbone, batch, "last-prompt", torch.zeros_like(with_end))
    assert alone.sum(1).tolist() == [1, 1], "as published"


def replace_target(query, target):
    return Query(query.prompt, target, query.image)


# -- targets --------------------------------------------------------------------------------


def lesson_of(model, requests, layer, *, answer_keys=True):
    batch = model.batch(requests)
    at, labels = batch.target_positions(model.end_id)
    prefix = model.prefix(batch, layer)
    said = at if answer_keys else torch.zeros_like(at)
    places = key_places(model, batch, "last-prompt", said)
    return Lesson(prefix, places, at, labels)


@pytest.mark.parametrize("answer_keys", [True, False])
def test_targets_of_a_batch_are_those_of_single_requests(model, answer_keys):
    requests = [REQUEST, Query("Which colour?", "green", REQUEST.image)]
    lesson = lesson_of(model, requests, 1, answer_keys=answer_keys)
    together, losses = hidden_targets(model, lesson, 2, TARGET)
    rows_of = lesson.places.nonzero()[:, 0]
    for row, request in enumerate(requests):
        lesson = lesson_of(model, [request], 1, answer_keys=answer_keys)
        alone, course = hidden_targets(model, lesson, 2, TARGET)
        assert torch.allclose(together[rows_of == row], alone, atol=1e-4)
        assert losses[row] == pytest.approx(course[0], abs=1e-4)
        assert course[0][-1] < course[0][0]


def test_targets_stay_within_the_clamp(model):
    lesson = lesson_of(model, [REQUEST], 1)
    start = states_at(model, lesson, 2)
    training = TargetTraining(steps=8, learning_rate=5.0, clamp=0.1)
    found, _ = hidden_targets(model, lesson, 2, training)
    lengths = (found - start).norm(dim=1)
    assert (lengths <= 0.1001 * start.norm(dim=1)).all()


def test_states_at_their_targets_give_the_answer(model):
    """With the states of a request set to its targets the answer is likelier; one key helps it less than all."""
    training = TargetTraining(
        steps=20, learning_rate=0.3, clamp=4.0, weight_decay=0.0, stop_loss=0.0
    )
    left = {}
    for answer_keys in (True, False):
        lesson = lesson_of(model, [REQUEST], 1, answer_keys=answer_keys)
        found, (course,) = hidden_targets(model, lesson, 2, training)
        with Patch(model.model) as patch, torch.no_grad():
            patch.hook(model.anchors.path("layer", 2), set_to(lesson.places, found))
            logits = model.resume(lesson.prefix, lesson.at)
        left[answer_keys] = float(answer_loss(logits, lesson.labels[lesson.at]))
        assert left[answer_keys] < course[0]
    assert left[True] < left[False]


def set_to(places, states):
    def change(leaving):
        changed = leaving.clone()
        changed[places] = states.to(leaving.dtype)
        return changed

    return change


@pytest.mark.parametrize("cls", [Memit, Alphaedit])
def test_several_keys_are_written_as_a_naive_solution_in_float64_says(model, cls):
    """One layer: (M + K'K) X = K'R, with a row of K and of R for each predicted token of all requests."""
    requests = [REQUEST, Query("Which colour?", "dark green", REQUEST.image)]
    more = {"keep": 2.0} if cls is Memit else {"threshold": 1e-2, "ridge": 2.0}
    hparams = cls.Hparams(layers=(2,), questions=8, target=TARGET, **more)
    lesson = lesson_of(model, requests, 2)
    targets, _ = hidden_targets(model, lesson, 2, TARGET)
    path = model.anchors.path("ffn_out", 2)
    keys = naive_keys(model, requests, path)
    missing = (targets - states_at(model, lesson, 2)).double()
    before = model.model.get_parameter(f"{path}.weight").detach().clone()
    editor = cls(model, hparams)
    with editor.edit(requests):
        change = model.model.get_parameter(f"{path}.weight").detach() - before
        moment = editor._moments()[2]
        width = len(moment)
        if cls is Memit:
            ridge = 1e-6 * moment.diagonal().mean()
            kept = 2.0 * (moment + ridge * torch.eye(width))
            system, wanted = kept + keys.T @ keys, keys.T @ missing
        else:
            basis = null_space(moment, 1e-2)
            projector = basis @ basis.T
            system = projector @ keys.T @ keys + 2.0 * torch.eye(width)
            wanted = projector @ keys.T @ missing
    expected = torch.linalg.solve(system, wanted)
    assert len(keys) > len(requests)
    assert torch.allclose(change.T.double(), expected, atol=1e-5)
    assert change.abs().max() > 1e-3


def naive_keys(model, requests, path):
    """Return what a matrix reads where a token of an answer or its end is predicted, request by request: (n, F)."""
    found = []
    for request in requests:
        batch = model.batch([request])
        with Patch(model.model) as patch, torch.no_grad():
            patch.hook_input(path, found.append)
            model.logits(batch)
        at = batch.predicting | batch.ends
        found[-1] = found[-1].reshape(*at.shape, -1)[at]
    return torch.cat(found).double()


# -- the editors --------------------------------------------------------------------------------


def test_alphaedit_changes_nothing_in_the_preserved_space(model):
    """The outputs for every key in the span of what is kept are what they were, to 1e-5."""
    hparams = AlphaeditHparams(
        layers=(1, 2), questions=3, threshold=1e-4, ridge=1e-2, target=TARGET
    )
    editor = Alphaedit(model, hparams)
    name = model.anchors.path("ffn_out", 1) + ".weight"
    before = model.model.get_parameter(name).detach().clone()
    with editor.edit([REQUEST, Query("Which colour?", "green", REQUEST.image)]):
        change = model.model.get_parameter(name).detach() - before
        basis = editor._basis(1)
        keys = rows(50, len(basis)).float()
        kept = keys - keys @ basis.float() @ basis.float().T
        assert change.abs().max() > 1e-4
        assert (kept @ change.T).abs().max() < 1e-5
        assert (keys @ change.T).abs().max() > 1e-3


def test_a_key_in_the_preserved_space_is_refused(model):
    hparams = AlphaeditHparams(
        layers=(1,), questions=4, threshold=1e-4, target=TARGET, expressible=0.999
    )
    editor = Alphaedit(model, hparams)
    weights = {k: v.clone() for k, v in model.model.state_dict().items()}
    with pytest.raises(DataError, match="edit not expressible: a key in layer 1"):
        editor.edit([REQUEST])
    assert editor.ids == []
    for key, value in model.model.state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_shares_of_the_layers_bring_the_state_to_its_target(model):
    """Where little is kept, each layer does its share, and hardly anything is missed at the end."""
    hparams = MemitHparams(layers=(1, 2), questions=4, keep=1e-6, target=TARGET)
    with Memit(model, hparams).edit([REQUEST]) as made:
        assert made.info["missed"][-1] < 0.05
    hparams = MemitHparams(layers=(1, 2), questions=4, keep=1e9, target=TARGET)
    with Memit(model, hparams).edit([REQUEST]) as made:
        assert made.info["missed"][-1] > 0.1


def test_rounds_go_on_until_every_token_is_right(model):
    """Each brings the answer nearer on the model that the last one left."""
    short = TargetTraining(steps=2, learning_rate=0.3, clamp=4.0)
    answers = []
    for rounds in (1, 4):
        hparams = MemitHparams(
            layers=(0, 1), questions=4, keep=1e-3, target=short, rounds=rounds
        )
        with Memit(model, hparams).edit([REQUEST]) as made:
            assert len(made.info["missed"]) <= rounds
            batch = model.batch([REQUEST])
            logits = model.logits(batch)[batch.predicting]
            answers.append(float(answer_loss(logits, batch.answers)))
    assert answers[1] < answers[0]


@pytest.mark.parametrize(
    ("cls", "wrong", "message"),
    [
        (MemitHparams, {"keep": 0.0}, "keep must be above 0"),
        (MemitHparams, {"layers": ()}, "layers must name at least one"),
        (MemitHparams, {"questions": 0}, "questions must be above 0"),
        (AlphaeditHparams, {"expressible": 1.0}, "expressible must lie from 0 to 1"),
        (AlphaeditHparams, {"threshold": 0.0}, "threshold must be above 0"),
        (TargetTraining, {"steps": 0}, "steps must be above 0"),
        (TargetTraining, {"weight_decay": -1.0}, "weight_decay must not be below 0"),
    ],
)
def test_values_that_make_no_sense_are_refused(cls, wrong, message):
    with pytest.raises(ValueError, match=message):
        cls(**wrong)


# -- the command --------------------------------------------------------------------------------


def test_moments_are_computed_beforehand(cli, tmp_path, monkeypatch, model):
    """What the command keeps is what the editor reads."""
    monkeypatch.setenv("MMEDIT_CACHE", str(tmp_path / "cache"))
    words = ("covariance", "--for", "memit", "--model", "tiny-blip2")
    code, text, err = cli(*words, "--json")
    assert code == 0, err
    report = json.loads(text)
    assert (report["layers"], report["questions"]) == ([0, 1], 4)
    assert report["path"] == str(default_path(model, "all"))
    questions = unrelated_questions(4)
    asked: list[int] = []
    ffn_moments(model, questions, [0, 1], tick=asked.append)
    assert asked == []
    for more, message in (
        (("--limit", "3"), "--for memit takes no captions"),
        (("--for", "ft"), "--for ft: needs no second moments"),
    ):
        code, _, err = cli(*words, *more)
        assert (code, message in err) == (2, True), err


def test_moments_of_a_language_model_are_of_questions_in_text(
    cli, tmp_path, monkeypatch
):
    monkeypatch.setenv("MMEDIT_CACHE", str(tmp_path / "cache"))
    words = ("covariance", "--for", "memit", "--model", "tiny-llama-lm")
    code, text, err = cli(*words, "--json")
    assert code == 0, err
    report = json.loads(text)
    assert report["questions"] == len(unrelated_questions(4, pictures=False))
    assert report["tokens"] > 0


def test_a_layer_that_the_model_does_not_have_is_refused(model):
    with pytest.raises(HparamsError, match=r"layer 99: .* has the layers 0 to"):
        Memit(model, MemitHparams(layers=(99,)))
