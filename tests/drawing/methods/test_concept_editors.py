"""TIME, UCE, RECE and SPEED: against solutions that are computed plainly, and what undo, order and files keep."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmedit_cli import registry
from mmedit_cli.drawing.methods.rece import adversarial, gram_of
from mmedit_cli.drawing.methods.shared.closed_form import Rows, kept, ridge_edit
from mmedit_cli.drawing.methods.shared.token_pairs import PAIRINGS, Spelled
from mmedit_cli.drawing.methods.speed import centres, constrained_change, null_space
from mmedit_cli.drawing.models.loading import load_stable_diffusion
from mmedit_cli.drawing.models.stable_diffusion import Sampling
from mmedit_cli.errors import DataError, StateError
from mmedit_cli.hparams import load_hparams
from mmedit_cli.runtime import generator
from mmedit_cli.types import ConceptChange

NAMES = registry.concept_editors.names()
DOG = ConceptChange("a dog", ("a red cat",), ("a teapot", "a blue boot"))
TOY = ConceptChange("a toy", (), ("a teapot",))
CAT = ConceptChange("a cat", ("a boot", "a backpack"))
TEAPOT = ConceptChange("a teapot", ("a stuffed animal",))


def make(name, model, *overrides):
    cls = registry.concept_editors.get(name)
    file = registry.hparams_file(name)
    return cls(model, load_hparams(file, cls.Hparams, overrides=overrides))


def weights(model):
    return {path: value.clone() for path, value in model.model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[path], other[path]) for path in one)


@pytest.fixture(scope="module")
def base(model):
    return weights(model)


@pytest.fixture(scope="module")
def tiny():
    return load_stable_diffusion("tiny-sd", device="cpu")


def random(*shape, seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=source, dtype=torch.float64)


# -- formulas ---------------------------------------------------------------------------------------------------


def plain_solution(weight, edits, stays, lam):
    """The formula of the papers as it is written: sums over edits, and an inverse."""
    left = lam * weight
    right = lam * torch.eye(weight.shape[1], dtype=torch.float64)
    for c, g, scale in edits:
        left = left + scale * torch.outer(weight @ g, c)
        right = right + scale * torch.outer(c, c)
    for k, scale in stays:
        left = left + scale * torch.outer(weight @ k, k)
        right = right + scale * torch.outer(k, k)
    return left @ torch.linalg.inv(right)


def test_the_ridge_edit_is_the_formula_of_the_papers():
    weight = random(12, 8)
    inputs, goals, stays = (
        random(5, 8, seed=1),
        random(5, 8, seed=2),
        random(3, 8, seed=3),
    )
    found = ridge_edit(weight, [Rows(inputs, goals, 0.7), kept(stays, 0.2)], 0.3)
    edits = [(c, g, 0.7) for c, g in zip(inputs, goals, strict=True)]
    expected = plain_solution(weight, edits, [(k, 0.2) for k in stays], 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["time", "uce"])
def test_an_editor_gives_the_plain_solution_of_its_rows(name, tiny):
    with make(name, tiny) as editor:
        originals = weights(tiny)
        editor.edit([DOG, TOY, CAT])
        edits = []
        for edit in editor.present():
            edits += [
                (c.double(), g.double(), 1.0)
                for c, g in zip(edit.inputs, edit.goals, strict=True)
            ]
        texts = {**editor.edits[1].kept, **editor.edits[2].kept}
        stays = [(k.double(), 1.0) for rows in texts.values() for k in rows]
        found = editor.changed_weights()
        assert len(found) == len(tiny.cross_attention())
        for path, value in found.items():
            weight = originals[path].double()
            expected = plain_solution(weight, edits, stays, editor.hparams.lam)
            torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)


def test_what_rece_finds_draws_like_the_erased_concept():
    bases = [random(9, 6, seed=seed) for seed in (1, 2)]
    change = 0.3 * random(6, 6, seed=3)
    edited = [base + base @ change for base in bases]
    c = random(1, 6, seed=4)
    found = adversarial(c, gram_of(bases), change, 0.1)
    left = 0.1 * torch.eye(6, dtype=torch.float64)
    right = torch.zeros(6, 6, dtype=torch.float64)
    for new, old in zip(edited, bases, strict=True):
        left = left + new.T @ new
        right = right + new.T @ old
    expected = torch.linalg.inv(left) @ right @ c[0]
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-11)


def rounds_by_hand(weights_of, edits, stays, hp):
    """RECE with chained=true as its code does it: every round edits all weights that the last one left."""
    bases = [weight.double() for weight in weights_of]
    now = [plain_solution(weight, edits, stays, hp.lam) for weight in bases]
    for _ in range(hp.rounds):
        left = hp.adversary * torch.eye(bases[0].shape[1], dtype=torch.float64)
        right = torch.zeros_like(left)
        for new, old in zip(now, bases, strict=True):
            left = left + new.T @ new
            right = right + new.T @ old
        turn = torch.linalg.inv(left) @ right
        again = [(turn @ c, g, scale) for c, g, scale in edits]
        now = [plain_solution(weight, again, stays, hp.lam) for weight in now]
    return now


def test_chained_rece_is_the_published_loop(tiny):
    with make("rece", tiny, "chained=true", "keep=[' ']", "rounds=2") as editor:
        originals = weights(tiny)
        editor.edit([CAT])
        edit = editor.edits[1]
        edits = [
            (c.double(), g.double(), 1.0)
            for c, g in zip(edit.inputs, edit.goals, strict=True)
        ]
        stays = [(k.double(), 0.1) for k in edit.kept[" "]]
        found = editor.changed_weights()
        expected = rounds_by_hand(
            [originals[path] for path in found], edits, stays, editor.hparams
        )
        for value, wanted in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(value.double(), wanted, rtol=1e-3, atol=1e-4)


def test_rece_leaves_less_of_a_concept_than_one_round(tiny):
    """How well an embedding that is found anew draws what the base model drew."""
    left = {}
    for rounds in (0, 3):
        with make("rece", tiny, f"rounds={rounds}", "pairing=last") as editor:
            bases = weights(tiny)
            editor.edit([CAT])
            found = {path: v.double() for path, v in editor.changed_weights().items()}
            gram = gram_of(bases[path] for path in found)
            moved = [torch.linalg.pinv(bases[p].double()) @ v for p, v in found.items()]
            c = editor.edits[1].inputs.double()
            change = torch.stack(moved).mean(0) - torch.eye(32, dtype=torch.float64)
            back = adversarial(c, gram, change, 0.1)
            wrong = [
                (v @ back[0] - bases[p].double() @ c[0]).norm()
                for p, v in found.items()
            ]
            left[rounds] = float(sum(wrong))
    assert left[3] > 1.5 * left[0]


def test_the_constrained_change_is_the_published_one():
    c, g, stays, exact = (
        random(2, 8),
        random(2, 8, seed=1),
        random(3, 8, seed=2),
        random(2, 8, seed=3),
    )
    free = null_space(stays, 1e-6)
    rows = Rows(c, g)
    found = constrained_change(rows.second_moment(), rows.gain(), free, exact, 0.5)
    eye = torch.eye(8, dtype=torch.float64)
    inner = torch.linalg.inv(c.T @ c @ free + 0.5 * eye)
    k = exact.T
    inverse = torch.linalg.inv(k.T @ free @ inner @ k)
    expected = (g - c).T @ c @ free @ (eye - inner @ k @ inverse @ k.T @ free) @ inner
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    assert (found @ stays.T).abs().max() < 1e-9
    assert (found @ exact.T).abs().max() < 1e-9
    assert (found @ c.T).abs().max() > 0.1


def speed_by_hand(weight, edits, stays, exact, hp):
    """SPEED as its code does it for one matrix, a row at a time."""
    width = weight.shape[1]
    eye = torch.eye(width, dtype=torch.float64)
    moment = sum(torch.outer(c, c) for c, _ in edits) / len(edits)
    gain = sum(torch.outer(g - c, c) for c, g in edits) / len(edits)
    plain = weight @ gain @ torch.linalg.inv(eye + moment)

    def influential(rows):
        moved = [float((plain @ row).norm()) for row in rows]
        mean = sum(moved) / len(moved)
        return [row for row, by in zip(rows, moved, strict=True) if by >= mean - 1e-12]

    some = influential(stays)
    least = torch.linalg.svd(weight).Vh[min(weight.shape) - 1]
    source = generator(hp.noise_seed)
    noise = torch.randn(
        hp.copies, len(some), width, generator=source, dtype=torch.float64
    )
    copies = [
        k + (n @ least) * least
        for more in noise
        for k, n in zip(some, more, strict=True)
    ]
    rows = some + influential(copies)
    mean_square = sum(torch.outer(k, k) for k in rows) / len(rows)
    values, vectors = torch.linalg.eigh(mean_square)
    free = torch.zeros_like(eye)
    for value, vector in zip(values, vectors.T, strict=True):
        if value < hp.threshold:
            free += torch.outer(vector, vector)
    inner = torch.linalg.inv(moment @ free + hp.lam * eye)
    k = exact.T
    inverse = torch.linalg.pinv(k.T @ free @ inner @ k, atol=1e-9)
    bound = eye - inner @ k @ inverse @ k.T @ free
    return weight + weight @ gain @ free @ bound @ inner


def test_speed_gives_the_plain_solution_with_the_published_values(tiny):
    keep = ("a boot", "a toy", "a teapot")
    with make("speed", tiny) as editor:
        originals = weights(tiny)
        editor.edit([ConceptChange("a dog", ("a red cat",), keep), CAT])
        edits = []
        for edit in editor.present():
            edits += zip(edit.inputs.double(), edit.goals.double(), strict=True)
        kept_rows = editor.edits[1].kept
        # no edit is about them, so all of them are kept
        stays = [row.double() for text in sorted(keep) for row in kept_rows[text]]
        ((_, empty),) = editor._encode("")
        exact = torch.cat([empty[:1], centres(empty[1:], 3)]).double()
        found = editor.changed_weights()
        assert found
        for path, value in found.items():
            weight = originals[path].double()
            expected = speed_by_hand(weight, edits, stays, exact, editor.hparams)
            assert (expected - weight).abs().max() > 1e-3
            torch.testing.assert_close(value.double(), expected, rtol=1e-3, atol=1e-5)


def test_what_is_kept_exactly_may_lie_outside_of_the_null_space():
    c, g, stays = random(2, 8), random(2, 8, seed=1), random(3, 8, seed=2)
    free = null_space(stays, 1e-6)
    rows = Rows(c, g)
    found = constrained_change(rows.second_moment(), rows.gain(), free, stays[:2], 0.5)
    assert found.isfinite().all()
    assert (found @ stays.T).abs().max() < 1e-9


def test_the_centres_are_those_of_separate_clouds():
    clouds = [random(5, 3, seed=i) / 100 + 10 * i for i in range(3)]
    found = centres(torch.cat(clouds), 3)
    wanted = torch.stack([cloud.mean(0) for cloud in clouds])
    order = found[:, 0].argsort()
    torch.testing.assert_close(found[order], wanted)


# -- tokens -----------------------------------------------------------------------------------------------------


def spelled(words, size=10):
    ids = ["start", *words.split(), "end"]
    return Spelled(words, (*ids, *["end"] * (size - len(ids))), len(ids))


def words_of(pairing, source, target):
    ours, theirs = spelled(source), spelled(target)
    found = PAIRINGS[pairing](ours, theirs)
    return {ours.ids[i]: theirs.ids[j] for i, j in found if ours.ids[i] != "end"}


def test_tokens_are_aligned():
    more = words_of("aligned", "a rose", "a blue rose")
    assert more == {"start": "start", "a": "a", "rose": "rose"}
    other = words_of("aligned", "a big lion here", "a tiger here")
    assert other == {
        "start": "start",
        "a": "a",
        "big": "tiger",
        "lion": "tiger",
        "here": "here",
    }
    fewer = words_of("aligned", "a blue rose", "a rose")
    assert fewer["blue"] == "rose"


@pytest.mark.parametrize("target", ["a blue rose", "a rose", "see a very blue rose"])
def test_both_alignments_agree_where_the_published_one_can(target):
    ours, theirs = spelled("a rose"), spelled(target)
    found = PAIRINGS["aligned"](ours, theirs)
    assert found == PAIRINGS["subsequence"](ours, theirs)
    assert [i for i, _ in found] == list(range(10))


def test_the_published_alignment_refuses_what_it_cannot_align(tiny):
    with make("time", tiny, "pairing=subsequence") as editor:
        with pytest.raises(DataError, match="not all words of 'a dog'"):
            editor.edit([DOG])
        assert not editor.edits
        assert not editor.changed_weights()


def test_last_and_tail():
    ours, theirs = spelled("a lion", 6), spelled("a big red tiger", 6)
    assert PAIRINGS["last"](ours, theirs) == [(2, 4)]
    assert PAIRINGS["tail"](ours, theirs) == [(2, 4), (3, 5), (4, 5), (5, 5)]
    assert PAIRINGS["last"](ours, spelled("", 6)) == [(2, 0)]


# -- editors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_undo_in_the_middle_is_never_having_made_it(name, model, base):
    with make(name, model) as editor:
        assert same(weights(model), base)
        editor.edit([DOG, CAT])
        without = weights(model)
        assert not same(without, base)
    assert same(weights(model), base)
    with make(name, model) as editor:
        for change in (DOG, TOY, CAT):
            editor.edit([change])
        everything = weights(model)
        editor.undo([2])
        assert same(weights(model), without)
        editor.redo([2])
        assert same(weights(model), everything)
        editor.undo([1, 2, 3])
        assert same(weights(model), base)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_edits_means_nothing(name, model):
    found = []
    for order in ([DOG, TOY, CAT], [CAT, DOG, TOY]):
        with make(name, model) as editor:
            editor.edit(order)
            found.append(weights(model))
    assert same(*found)


@pytest.mark.parametrize("name", NAMES)
def test_files_keep_every_bit(name, tiny, tmp_path):
    with make(name, tiny) as editor:
        editor.edit([DOG, TOY])
        before = weights(tiny)
        for i, edit in editor.edits.items():
            editor.save(edit, tmp_path / f"{i}.safetensors")
    with make(name, tiny) as editor:
        editor.edits = {i: editor.read(tmp_path / f"{i}.safetensors") for i in (1, 2)}
        editor.apply()
        assert same(weights(tiny), before)
        assert editor.edits[1].change == DOG
    other = make("uce" if name != "uce" else "time", tiny)
    with pytest.raises(StateError, match="not an edit of"):
        other.read(tmp_path / "1.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_many_edits_at_once_do_not_collapse(name, tiny):
    words = (
        "dog",
        "cat",
        "toy",
        "teapot",
        "boot",
        "backpack",
        "snow",
        "beach",
        "jungle",
    )
    changes = [ConceptChange(f"a {word}", ("a picture",)) for word in words]
    with make(name, tiny) as editor:
        editor.edit(changes)
        pictures = tiny.generate(["a red dog", "a beach"], [0, 1], Sampling(steps=2))
    for picture in pictures:
        assert np.asarray(picture).std() > 5


def test_an_edit_reaches_its_goal_and_keeps_what_is_named(tiny):
    """The value of the last token is near that of the target, and nearer for what is kept than without --keep."""
    errors = {}
    for texts in ((), ("a boot",)):
        with make("uce", tiny, "lam=0.01") as editor:
            path = tiny.cross_attention()[1].path
            old = weights(tiny)[f"{path}.weight"]
            editor.edit([ConceptChange("a dog", ("a cat",), texts)])
            new = editor.changed_weights()[f"{path}.weight"]
            c, g = editor.edits[1].inputs[0], editor.edits[1].goals[0]
            assert (new @ c - old @ g).norm() < 0.05 * (old @ c - old @ g).norm()
            boot = editor.make(ConceptChange("a boot", ("a cat",))).inputs[0]
            errors[texts] = float(((new - old) @ boot).norm())
    assert errors[("a boot",)] < 0.2 * errors[()]


def test_several_targets_are_their_mean(tiny):
    with make("uce", tiny) as editor:
        goals = [editor.make(ConceptChange("a cat", (t,))).goals for t in CAT.targets]
        torch.testing.assert_close(editor.make(CAT).goals, torch.stack(goals).mean(0))


def test_the_last_edit_of_a_text_counts(tiny):
    again = ConceptChange("a dog", ("a boot",))
    with make("uce", tiny) as editor:
        editor.edit([again])
        wanted = weights(tiny)
    with make("uce", tiny) as editor:
        editor.edit([DOG, again])
        assert same(weights(tiny), wanted)


def test_what_an_edit_is_about_is_not_kept_by_another(tiny):
    with make("uce", tiny) as editor:
        editor.edit([DOG, TEAPOT])
        assert len(editor._kept(editor.present())) == 1  # a blue boot


def test_without_keys_only_values_change(tiny):
    with make("time", tiny, "roles=[v]") as editor:
        editor.edit([DOG])
        assert all(path.endswith("to_v.weight") for path in editor.changed_weights())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (ConceptChange(" ", ("a cat",)), "an empty text"),
        (ConceptChange("a dog " * 20, ("a cat",)), "longer than the 24 tokens"),
    ],
)
def test_texts_that_cannot_be_used(change, message, tiny):
    before = weights(tiny)
    with make("uce", tiny) as editor:
        with pytest.raises(DataError, match=message):
            editor.edit([TOY, change])
        assert not editor.edits
        assert same(weights(tiny), before)


def test_ids_that_are_not_there(tiny):
    with make("uce", tiny) as editor:
        editor.edit([TOY])
        with pytest.raises(StateError, match="2: no active edit"):
            editor.undo([2])
        with pytest.raises(StateError, match="1: no undone edit"):
            editor.redo([1])
