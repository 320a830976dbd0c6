"""Training in the open world sees all that training may see and nothing else, and a stop changes nothing."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, imported_scripts
from safetensors.torch import load_file

from mmedit_cli import runtime
from mmedit_cli.errors import UserError
from mmedit_cli.knowledge.data.emojikb_open import EVALUATION, all_wordings, artist_uses

pytestmark = pytest.mark.slow

DATA = ROOT / "data" / "emojikb"
CPU = torch.device("cpu")
RECIPE = ROOT / "scripts" / "mini_blip2_open.yaml"


@pytest.fixture(scope="module")
def scripts():
    """The modules of the scripts, imported as the scripts do."""
    with imported_scripts(
        runs="mini_runs",
        data="mini_vlm_data",
        model="mini_vlm_model",
        open="mini_vlm_open",
        training="mini_vlm_training",
        train="train_mini_vlm",
        stages="score_mini_stages",
    ) as modules:
        runtime.quiet_libraries()
        yield modules


@pytest.fixture(scope="module")
def recipe(scripts):
    """The quick recipe with a few steps a stage."""
    quick = scripts.model.Recipe.read(RECIPE, quick=True)
    stages = {
        name: replace(stage, passes=1, pictures=48)
        for name, stage in quick.stages.items()
    }
    return replace(quick, stages=stages)


@pytest.fixture(scope="module")
def whole(scripts):
    """All of EmojiKB that training may see."""
    return scripts.data.load_emojikb(None, 60, 150, further=300)


@pytest.fixture(scope="module")
def trainee(scripts, recipe):
    kb = scripts.data.load_emojikb(24, 2, 4, further=4)
    return scripts.training.Trainee(recipe, kb, CPU)


def unseen() -> set[str]:
    return {name for name, use in artist_uses(DATA).items() if use == EVALUATION}


# -- what is seen ---------------------------------------------------------------------------------------------------


def test_no_artist_and_no_wording_for_evaluation_is_seen(whole):
    artists = {artist for _, artist in whole.drawings}
    assert artists == artist_uses(DATA).keys() - unseen()
    wordings = all_wordings(DATA)
    for kind, forms in whole.templates.items():
        asked = set(forms["image"])
        assert set(wordings[kind]["train"]) <= asked
        assert not asked & {*wordings[kind]["eval"], *wordings[kind]["val"]}
        assert len(asked) == 44


def test_what_was_held_out_before_still_is(scripts, whole):
    before = scripts.data.load_emojikb(None, 60, 150).holdout
    assert whole.holdout.concepts == before.concepts
    assert before.artists.items() <= whole.holdout.artists.items()
    more = whole.holdout.artists.keys() - before.artists.keys()
    assert len(more) == 300
    assert {whole.holdout.artists[c] for c in more} == set(scripts.data.FURTHER_HANDS)


def test_one_hand_is_held_out_whole(scripts, whole):
    pairs = whole.holdout.artists.items()
    concept = next(c for c, left_out in pairs if left_out == "fluent")
    for artist in ("fluent", "fluent-flat", "fluent-line"):
        assert not whole.holdout.allows(concept, artist)
    assert whole.holdout.allows(concept, "noto")
    assert scripts.data.hand("emojione-v1") == "emojione-v1"


def test_partners_are_other_drawings_of_the_same_thing(trainee):
    pictures = trainee.pictures
    chosen = pictures.usable
    partners = pictures.partners(chosen, torch.Generator().manual_seed(0))
    assert torch.equal(pictures.concept[partners], pictures.concept[chosen])
    assert torch.isin(partners, pictures.usable).all()
    alone = [(pictures.concept[chosen] == c).sum() == 1 for c in pictures.concept]
    assert (partners != chosen).all() or any(alone)


# -- changed pictures -----------------------------------------------------------------------------------------------


def test_pictures_are_changed_and_named_backgrounds_are_kept(trainee):
    chosen = trainee.pictures.usable.repeat(3)
    draw = trainee.pictures.draw
    pixels, colour = draw(chosen, torch.Generator().manual_seed(1))
    again, _ = draw(chosen, torch.Generator().manual_seed(1))
    assert torch.equal(pixels, again)
    assert pixels.shape == (len(chosen), 3, 64, 64)
    assert pixels.min() >= 0
    assert pixels.max() <= 255
    named = colour >= 0
    assert 0.35 < named.float().mean() < 0.65
    corners = pixels[named][:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    wanted = trainee.pictures.grounds[colour[named]][:, :, None]
    near = ((corners - wanted).abs().amax(1) < 12).any(1)
    assert near.float().mean() > 0.9


def test_flags_and_signs_are_not_mirrored(scripts):
    picture = torch.zeros(64, 4, 8, 8)
    picture[..., :4] = 1.0
    generator = torch.Generator().manual_seed(2)
    still = torch.zeros(64, dtype=torch.bool)
    moved = scripts.open.moved_about(picture, still, generator)
    assert (moved[..., :4].sum((1, 2, 3)) > moved[..., 4:].sum((1, 2, 3))).all()


def test_lines_can_be_seen_on_every_ground(scripts, whole):
    kb = replace(whole, concepts=whole.concepts[:12])
    pictures = scripts.open.OpenPictures(kb, CPU)
    lined = [i for i, (_, artist) in enumerate(kb.drawings) if "-line" in artist]
    chosen = torch.tensor(lined * 4)
    dark = torch.zeros(len(chosen), 3, 64, 64)
    drawing = pictures.rgba[chosen][:, :3].float() / 255
    ink = pictures._recoloured(drawing, chosen, dark, torch.Generator().manual_seed(3))
    assert ink.amin() > 0.6


def test_flags_keep_their_hues_and_other_drawings_do_not(scripts):
    red = torch.tensor([0.9, 0.1, 0.1])[:, None, None].expand(200, 3, 8, 8)
    alpha = torch.ones(200, 1, 8, 8)
    flag = torch.arange(200) < 100
    styled = scripts.open.restyled(
        red.clone(), alpha, flag, torch.Generator().manual_seed(5)
    )
    assert styled.amin() >= 0
    assert styled.amax() <= 1
    reddest = (styled.mean((2, 3)).argmax(1) == 0) & (styled.std(1).mean((1, 2)) > 0.1)
    assert reddest[:100].all()
    assert 0.5 < reddest[100:].float().mean() < 1


def test_edges_are_where_colours_or_shapes_end(scripts):
    drawing = torch.zeros(1, 3, 16, 16)
    drawing[..., 8:] = 1.0
    alpha = torch.ones(1, 1, 16, 16)
    alpha[..., :2, :] = 0
    found = scripts.open.edges(drawing, alpha)[0, 0]
    assert (found[8:, 7:9] == 1).all()
    assert (found[1:3, :4] == 1).all()
    assert (found[8:, :6] == 0).all()
    assert (found[8:, 10:] == 0).all()


def test_shapes_are_bent_a_little_and_some_lose_a_part(scripts):
    generator = torch.Generator().manual_seed(6)
    bends = scripts.open.bends(100, 64, generator)
    assert bends.shape == (100, 64, 64, 2)
    assert 0 < bends.abs().mean() < 0.1
    kept = scripts.open.kept(400, 64, generator)
    lost = 1 - kept.mean((1, 2, 3))
    assert 0.05 < (lost > 0).float().mean() < 0.25
    assert lost.amax() < 0.15


# -- noisy wordings -------------------------------------------------------------------------------------------------


def test_noise_depends_on_the_chance_alone_and_keeps_most_words(scripts):
    frames = ["{} Thanks."]
    text = "Tell me which country has this flag."
    made = [scripts.open.noisy(text, frames, random.Random(n)) for n in range(300)]
    assert made == [
        scripts.open.noisy(text, frames, random.Random(n)) for n in range(300)
    ]
    assert len(set(made)) > 20
    kept = [{*text.lower().split()} & {*words.lower().split()} for words in made]
    assert all(len(words) >= 5 for words in kept)


def test_a_share_of_the_pictures_is_drawn_plainly(trainee, recipe):
    pictures = trainee.pictures
    shown = pictures.usable[:20]

    def drawn(share):
        stage = replace(recipe.stages["settle"], plainly=share)
        return trainee._drawn(shown, stage, torch.Generator().manual_seed(3))

    generator = torch.Generator().manual_seed(3)
    changed, colour = pictures.draw(shown, generator)
    chance = torch.rand(20, generator=generator)
    for share in (0.0, 0.5, 1.0):
        plain = chance < share
        state = generator.get_state()
        still, still_colour = pictures.draw_plainly(shown[plain], generator)
        generator.set_state(state)
        pixels, named = drawn(share)
        assert torch.equal(pixels[~plain], changed[~plain])
        assert torch.equal(pixels[plain], still)
        assert torch.equal(named[~plain], colour[~plain])
        assert torch.equal(named[plain], still_colour)


def test_answers_follow_their_questions(trainee):
    questions, generator = trainee.questions, torch.Generator().manual_seed(4)
    concept = trainee.pictures.concept[trainee.pictures.usable[:6]]
    rows, kinds = questions.ask(concept, torch.zeros(6, dtype=torch.long), 3, generator)
    texts = questions.ask_text(4, generator)
    assert rows.shape == kinds.shape == (6, 3)
    batch = questions.rows(torch.cat((rows.flatten(), texts)))
    assert batch.ids.shape == batch.mask.shape == batch.predicting.shape
    decode = trainee.adapter.tokenizer.decode
    answers = decode(batch.answers).split("</s>")
    assert len(answers) == 6 * 3 + 4 + 1
    names = {fact["answer"] for fact in trainee.kb.facts} | {*trainee.kb.backgrounds}
    assert {answer.strip() for answer in answers if answer.strip()} <= names


# -- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(scripts, recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("open")
    assert scripts.train.train(
        recipe, out, device=CPU, stages=tuple(recipe.stages), stop=scripts.runs.Stop()
    )
    return out


def test_a_model_says_what_it_was_trained_on(trained):
    path = trained / "mini-blip2" / "training.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    assert not set(record["artists"]) & unseen()
    asked = {text for texts in record["wordings"].values() for text in texts}
    wordings = all_wordings(DATA)
    wordings.pop("frames")
    assert not asked & {text for sides in wordings.values() for text in sides["eval"]}


def test_the_stages_are_measured(scripts, recipe, trained, capsys, monkeypatch):
    kb = scripts.data.load_emojikb(24, 2, 4, further=4)
    few = scripts.training.Trainee(recipe, kb, CPU)
    sets = scripts.stages.drawings(kb, few)
    assert list(sets) == ["first artists", "own", "held-out", "unseen artists"]
    assert all(len(rgba) == len(names) > 0 for rgba, names in sets.values())
    files = [str(trained / f"{stage}.safetensors") for stage in ("tower", "joint")]
    monkeypatch.setattr(scripts.stages, "BATCH", 16)
    assert scripts.stages.main([str(RECIPE), "--quick", *files]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 4 * len(files)
    own = {row.split(" | ")[1]: float(row.split(" | ")[3]) for row in rows[:4]}
    assert own["tower's nearest mean"] > 100 / 24  # better than chance


def test_what_is_no_stage_is_not_measured(scripts, recipe, trained, tmp_path):
    kb = scripts.data.load_emojikb(24, 2, 4, further=4)
    few = scripts.training.Trainee(recipe, kb, CPU)
    for name in ("tower.safetensors", "mini-blip2/model.safetensors"):
        with pytest.raises(UserError, match="no file of a stage"):
            scripts.stages.put(few, tmp_path / name)
    other = replace(recipe, vocabulary=1100)
    with pytest.raises(UserError, match="from another recipe"):
        scripts.stages.put(
            scripts.training.Trainee(other, kb, CPU), trained / "tower.safetensors"
        )


def test_a_tower_with_a_teacher_is_not_trained_without(scripts, tmp_path):
    whole = scripts.model.Recipe.read(RECIPE)
    with pytest.raises(UserError, match="has a teacher"):
        scripts.train.train(
            whole, tmp_path / "run", device=CPU, stages=("tower",), stop=lambda: True
        )
    assert not (tmp_path / "run").exists()


def test_a_stop_changes_no_bit_and_a_run_can_start_from_a_model(
    scripts, recipe, trained, tmp_path
):
    start = trained / "mini-blip2"

    def run(out: Path, steps: int | None) -> int:
        stops = 0
        while not scripts.train.train(
            recipe,
            out,
            device=CPU,
            stages=tuple(recipe.stages),
            stop=scripts.runs.Stop(steps=steps),
            start_from=start,
        ):
            stops += 1
        return stops

    assert run(tmp_path / "once", None) == 0
    assert run(tmp_path / "stopped", 1) >= 3
    for stage in recipe.stages:
        once, stopped = (
            load_file(tmp_path / name / f"{stage}.safetensors")
            for name in ("once", "stopped")
        )
        assert once.keys() == stopped.keys()
        assert all(torch.equal(once[key], stopped[key]) for key in once), stage


def test_a_model_of_another_shape_is_refused(scripts, recipe, trained):
    kb = scripts.data.load_emojikb(24, 2, 4, further=4)
    other = replace(recipe, text={**recipe.text, "hidden_size": 32})
    with pytest.raises(UserError, match="another shape"):
        scripts.training.Trainee(other, kb, CPU, trained / "mini-blip2")


def test_the_contrastive_loss_is_lower_where_artists_agree(scripts):
    concept = torch.tensor([0, 1, 0, 1])
    apart = torch.eye(4)
    together = torch.eye(4)[[0, 1, 0, 1]]
    loss = scripts.training.contrast_between
    assert loss(together, concept) < 0.1 < loss(apart, concept)


@pytest.mark.parametrize("name", ["mini_blip2_open", "mini_llava_open"])
def test_what_the_language_model_reads_is_blended(scripts, name):
    recipe = scripts.model.Recipe.read(ROOT / "scripts" / f"{name}.yaml", quick=True)
    kb = scripts.data.load_emojikb(**recipe.world)
    trainee = scripts.training.Trainee(recipe, kb, CPU)
    generator = torch.Generator().manual_seed(0)
    pixels = 255 * torch.rand(4, 3, 64, 64, generator=generator)
    with torch.no_grad():
        before = trainee.image_tokens(pixels)
        with trainee.blending(0.9, generator):
            assert not torch.allclose(trainee.image_tokens(pixels), before)
        assert torch.equal(trainee.image_tokens(pixels), before)
