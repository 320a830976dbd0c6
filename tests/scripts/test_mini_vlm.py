"""The scripts that train and score the mini models: what is held out, what is fed, and that a stop changes nothing."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, imported_scripts
from safetensors.torch import load_file

from mmedit_cli import runtime
from mmedit_cli.errors import UserError
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.pictures import Picture, load_picture
from mmedit_cli.types import Query

pytestmark = pytest.mark.slow
DATA = ROOT / "data" / "emojikb"
CPU = torch.device("cpu")
RECIPES = ("mini_blip2", "mini_llava")


FIRST_STAGES = ("tower", "decoder", "joint")  # of the closed recipes


@pytest.fixture(scope="module")
def scripts():
    """The modules of the scripts, imported as the scripts do."""
    with imported_scripts(
        common="mini_training",
        runs="mini_runs",
        data="mini_vlm_data",
        model="mini_vlm_model",
        training="mini_vlm_training",
        score="score_mini_vlm",
        train="train_mini_vlm",
    ) as modules:
        runtime.quiet_libraries()
        yield modules


def short(scripts, name: str, **passes: int):
    """The quick recipe with fewer passes."""
    recipe = scripts.model.Recipe.read(ROOT / "scripts" / f"{name}.yaml", quick=True)
    stages = {
        stage: replace(recipe.stages[stage], passes=passes.get(stage, 1))
        for stage in recipe.stages
    }
    return replace(recipe, stages=stages)


@pytest.fixture(scope="module", params=RECIPES)
def trained(request, scripts, tmp_path_factory):
    """A run of some seconds without a stop: (name of the recipe, folder of the run)."""
    out = tmp_path_factory.mktemp(request.param)
    recipe = short(scripts, request.param, tower=4, decoder=4)
    finished = scripts.train.train(
        recipe, out, device=CPU, stages=tuple(recipe.stages), stop=scripts.runs.Stop()
    )
    assert finished
    return request.param, out


def folder_of(run: Path) -> Path:
    return next(path.parent for path in run.glob("*/config.json"))


# -- what is held out -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def concepts(scripts) -> list[dict]:
    return scripts.data.lines(DATA / "concepts.jsonl.gz")


def test_holdout_depends_on_the_concepts_alone(scripts, concepts):
    holdout = scripts.data.choose_holdout(concepts, 60, 150)
    mixed = random.Random(0).sample(concepts, len(concepts))
    assert scripts.data.choose_holdout(mixed, 60, 150) == holdout
    digest = hashlib.sha256(
        json.dumps([holdout.concepts, holdout.artists]).encode()
    ).hexdigest()
    assert digest.startswith("4053d9462385f592"), (
        "another hold-out: train and score the shipped models again"
    )


def test_holdout_is_what_the_issue_asks_for(scripts, concepts):
    holdout = scripts.data.choose_holdout(concepts, 60, 150)
    by_id = {c["id"]: c for c in concepts}
    sides = Counter(by_id[c]["split"] for c in holdout.concepts)
    assert len(holdout.concepts) == 60
    assert sides == {"train": 25, "val": 5, "eval": 30}
    assert all(by_id[c]["role"] == "edit" for c in holdout.concepts)
    assert len(holdout.artists) == 150
    assert not set(holdout.artists) & set(holdout.concepts)
    assert all(artist in by_id[c]["artists"] for c, artist in holdout.artists.items())
    assert set(holdout.artists.values()) == {"noto", "twemoji", "fluent", "openmoji"}


def test_nothing_held_out_is_trained_on(scripts):
    recipe = short(scripts, "mini_blip2")
    kb = scripts.data.load_emojikb(24, 2, 4)
    trainee = scripts.training.Trainee(recipe, kb, CPU)
    used = {kb.drawings[i] for i in trainee.pictures.usable.tolist()}
    assert len(used) == len(kb.drawings) - 4 - sum(
        c in kb.holdout.concepts for c, _ in kb.drawings
    )
    assert not used & set(kb.holdout.artists.items())
    left_out = [i for i, c in enumerate(kb.concepts) if c["id"] in kb.holdout.concepts]
    assert left_out
    assert (trainee.questions.with_picture[left_out] == -1).all()
    held = {
        fact["it"]
        for fact in kb.facts
        if fact["concept"] in kb.holdout.concepts and "it" in fact
    }
    asked = [row for rows in trainee.questions.text.tolist() for row in rows]
    texts = {
        trainee.adapter.tokenizer.decode(scripts_row(trainee, row)) for row in asked
    }
    assert not [
        text for text in texts for it in held if f" {it}?" in text or f" {it} " in text
    ]


def scripts_row(trainee, row: int) -> list[int]:
    rows = trainee.questions.rows(torch.tensor([row]))
    return rows.ids[0, : int(rows.mask.sum())].tolist()


# -- what the model is fed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_pixels_in_training_are_those_of_the_processor(scripts, name):
    kb = scripts.data.load_emojikb(12, 0, 0)
    trainee = scripts.training.Trainee(short(scripts, name), kb, CPU)
    pictures = trainee.pictures
    for place in (0, len(kb.drawings) // 2, len(kb.drawings) - 1):
        concept, artist = kb.drawings[place]
        for i, colour in enumerate(kb.backgrounds.values()):
            image = load_picture(Picture(DATA / artist / f"{concept}.png", colour))
            wanted = trainee.adapter.image_processor(
                images=[image], return_tensors="pt"
            )["pixel_values"]
            rgba = pictures.rgba[place][None]
            made = scripts.data.composed(
                rgba[:, :3], rgba[:, 3:], pictures.grounds[i][None]
            )
            level = 1 / 255 / min(scripts.model.STD)
            assert (
                scripts.model.normalise(made) - wanted
            ).abs().max() < 1.01 * level  # at most one of 256 levels
            assert (scripts.model.normalise(made) - wanted).abs().mean() < 0.02 * level


@pytest.mark.parametrize("name", RECIPES)
def test_sequences_are_those_of_the_adapter_closed_by_the_end_token(scripts, name):
    kb = scripts.data.load_emojikb(12, 0, 0)
    trainee = scripts.training.Trainee(short(scripts, name), kb, CPU)
    fact = next(fact for fact in kb.facts if fact["type"] == "kind")
    place = [c["id"] for c in kb.concepts].index(fact["concept"])
    chosen = trainee.questions.with_picture[place, scripts.data.TYPES.index("kind")]
    rows = trainee.questions.rows(chosen)
    end = trainee.adapter.tokenizer.eos_token_id
    for i, template in enumerate(kb.templates["kind"]["image"]):
        encoded = trainee.adapter.encode(
            Query(template, fact["answer"], DATA / "noto" / "any.png")
        )
        ids = rows.ids[i, : int(rows.mask[i].sum())].tolist()
        assert ids == [*encoded.ids, end]
        assert trainee.questions.image_start == encoded.image_start
        assert trainee.questions.n_image == encoded.n_image
        at = rows.predicting[i].nonzero()[:, 0]
        assert at.tolist() == list(range(len(ids) - encoded.n_answer - 2, len(ids) - 1))
        assert rows.ids[i, at + 1].tolist() == ids[-encoded.n_answer - 1 :]
    assert torch.equal(rows.answers, rows.ids.roll(-1, 1)[rows.predicting])


def test_augmentation_moves_the_drawing_and_keeps_named_backgrounds(scripts):
    data = scripts.data
    dot = torch.zeros(64, 4, 64, 64, dtype=torch.uint8)
    dot[:, :, 30, 33] = 255
    moved = data.shifted(dot, 4, torch.Generator().manual_seed(0))
    places = moved[:, 3].flatten(1).argmax(1)
    rows, columns = places // 64, places % 64
    assert set(rows.tolist()) == set(range(26, 35))
    assert set(columns.tolist()) == set(range(29, 38))
    kb = data.load_emojikb(6, 0, 0)
    pictures = data.Pictures(kb, CPU)
    pictures.rgba[:, 3] = 0  # nothing but background
    drawn, colour = pictures.draw(
        torch.zeros(400, dtype=torch.long), torch.Generator().manual_seed(0)
    )
    named = colour >= 0
    assert 0.6 < named.float().mean() < 0.8
    assert torch.equal(
        drawn[named],
        pictures.grounds[colour[named]][:, :, None, None].expand(-1, -1, 64, 64),
    )


def test_background_is_asked_only_of_named_colours(scripts):
    kb = scripts.data.load_emojikb(12, 0, 0)
    questions = scripts.training.Trainee(
        short(scripts, "mini_blip2"), kb, CPU
    ).questions
    concept = torch.arange(12).repeat(20)
    colour = torch.tensor([-1, 3]).repeat(120)
    rows, kinds = questions.ask(concept, colour, 3, torch.Generator().manual_seed(0))
    asked = kinds == scripts.data.BACKGROUND
    assert not asked[colour == -1].any()
    assert asked[colour == 3].any()
    assert set(rows[asked].tolist()) <= set(questions.on_colour[3].tolist())
    assert (rows >= 0).all()
    assert all(len(set(row)) == 3 for row in kinds.tolist())


# -- training ---------------------------------------------------------------------------------------------------


def test_a_stop_in_every_stage_changes_no_bit(scripts, trained, tmp_path):
    name, whole = trained
    recipe = short(scripts, name, tower=4, decoder=4)
    stops = 0
    while not scripts.train.train(
        recipe,
        tmp_path,
        device=CPU,
        stages=tuple(recipe.stages),
        stop=scripts.runs.Stop(steps=7),
    ):
        stops += 1
    assert stops >= 3
    for stage in FIRST_STAGES:
        once, continued = (
            load_file(out / f"{stage}.safetensors") for out in (whole, tmp_path)
        )
        assert once.keys() == continued.keys()
        assert all(torch.equal(once[key], continued[key]) for key in once), stage


def test_each_stage_trains_its_own_part(scripts, trained):
    _, out = trained
    tower, decoder, joint = (
        load_file(out / f"{stage}.safetensors") for stage in FIRST_STAGES
    )
    weights = [key for key in tower if key.startswith("model.")]
    seeing = {key for key in weights if "vision_" in key}
    assert all(torch.equal(tower[key], decoder[key]) for key in seeing)
    assert not any(key.startswith("optimizer") and "vision_" in key for key in decoder)
    assert any(key.startswith("optimizer/exp_avg/readers.") for key in decoder)
    assert not any(key.startswith("optimizer/exp_avg/readers.") for key in joint)
    unread = {
        key for key in seeing if "post_layernorm" in key
    }  # LLaVA takes what comes before it
    moved = {key for key in weights if not torch.equal(decoder[key], joint[key])}
    assert set(weights) - moved <= unread


def test_loss_falls(scripts, trained):
    _, out = trained
    ends = {line["stage"]: line for line in scripts.data.lines(out / "log.jsonl")}
    assert list(ends) == list(FIRST_STAGES)
    assert (
        ends["joint"]["loss"] < 7.0 < ends["decoder"]["loss"]
    )  # ln 1200, a guess among all tokens, is 7.09


def test_the_folder_loads_and_answers(scripts, trained):
    name, out = trained
    folder = folder_of(out)
    backbone = load_backbone(str(folder), device="cpu")
    assert (
        backbone.name
        == scripts.model.Recipe.read(ROOT / "scripts" / f"{name}.yaml").name
    )
    assert backbone.n_layers >= 6
    queries = [
        Query("What is this?", image=DATA / "noto" / "1f412.png", background="#b3d1ff"),
        Query("What is it?"),
    ]
    assert all(
        isinstance(text, str) for text in backbone.generate(queries, max_new_tokens=4)
    )
    exact = load_file(out / "joint.safetensors")
    for key, parameter in backbone.model.named_parameters():
        assert torch.equal(parameter, exact[f"model.{key}"].half().float()), key
    written = json.loads((folder / "holdout.json").read_text())
    kb = scripts.data.load_emojikb(24, 2, 4)
    assert (
        scripts.data.Holdout(tuple(written["concepts"]), written["artists"])
        == kb.holdout
    )


def test_the_folder_works_with_a_processor(trained):
    from transformers import AutoProcessor

    _, out = trained
    folder = folder_of(out)
    processor, backbone = (
        AutoProcessor.from_pretrained(folder),
        load_backbone(str(folder), device="cpu"),
    )
    image = load_picture(Picture(DATA / "noto" / "1f412.png"))
    llava = backbone.family == "llava"
    made = processor(
        images=image,
        text="<image>\nWhat is this?" if llava else "What is this?",
        return_tensors="pt",
    )
    ours = backbone.encode(
        Query("What is this?", image=DATA / "noto" / "1f412.png"), with_answer=False
    )
    start, end = ours.image_start, ours.image_start + ours.n_image
    ids = made["input_ids"][0].tolist()
    assert len(ids) == len(ours.ids)
    assert ids[:start] + ids[end:] == ours.ids[:start] + ours.ids[end:]


def test_another_recipe_is_not_continued(scripts, trained):
    name, out = trained
    recipe = replace(short(scripts, name), seed=99)
    with pytest.raises(UserError, match="from another recipe"):
        scripts.train.train(
            recipe, out, device=CPU, stages=("joint",), stop=scripts.runs.Stop()
        )


def test_schedule_warms_up_and_ends_at_zero(scripts):
    stage = scripts.model.Stage(passes=1, pictures=1, rate=1.0, decay=0.0, warmup=0.1)
    rates = [scripts.common.rate_at(step, 100, stage) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("name", RECIPES)
def test_the_real_recipes_fit_the_folder(scripts, name):
    recipe = scripts.model.Recipe.read(ROOT / "scripts" / f"{name}.yaml")
    kb = scripts.data.load_emojikb(None, 60, 150)
    tokenizer = scripts.model.build_tokenizer(kb.texts(), recipe.vocabulary)
    adapter = scripts.model.build(recipe, tokenizer)
    assert adapter.n_layers >= 6
    assert len(tokenizer) == adapter.model.get_output_embeddings().weight.shape[0]
    assert (
        sum(p.numel() for p in adapter.model.parameters()) * 2 < 11.8e6
    )  # bytes in float16; the rest is text


def test_a_clip_tower_starts_from_a_blip_tower(scripts, tmp_path):
    blip, llava = tmp_path / "blip", tmp_path / "llava"
    recipe = short(scripts, "mini_blip2", tower=2)
    assert scripts.train.train(
        recipe, blip, device=CPU, stages=("tower",), stop=scripts.runs.Stop()
    )
    kb = scripts.data.load_emojikb(24, 2, 4)
    ours = scripts.training.Trainee(short(scripts, "mini_llava"), kb, CPU)
    llava.mkdir()
    scripts.training.adopt_tower(ours, blip / "tower.safetensors", llava)
    assert scripts.common.read_progress(llava, "tower").origin == "mini-blip2"
    theirs = scripts.training.Trainee(recipe, kb, CPU)
    theirs.load_state_dict(load_file(blip / "tower.safetensors"), strict=False)
    pixels = scripts.model.normalise(torch.rand(4, 3, 64, 64) * 255)
    mine, other = (
        ours.model.get_submodule(ours.tower),
        theirs.model.get_submodule(theirs.tower),
    )
    mine.pre_layrnorm = torch.nn.Identity()  # the one thing BLIP-2 does not have
    wanted = other(pixels).last_hidden_state
    assert torch.allclose(
        mine.post_layernorm(mine(pixels).last_hidden_state), wanted, atol=1e-5
    )


def test_a_blip_tower_starts_from_another_run(scripts, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    recipe = short(scripts, "mini_blip2", tower=2)
    stop = scripts.runs.Stop()
    assert scripts.train.train(recipe, first, device=CPU, stages=("tower",), stop=stop)
    kb = scripts.data.load_emojikb(24, 2, 4)
    ours = scripts.training.Trainee(recipe, kb, CPU)
    second.mkdir()
    scripts.training.adopt_tower(ours, first / "tower.safetensors", second)
    wanted = load_file(first / "tower.safetensors")
    tower = [name for name in wanted if name.startswith("model.vision_model.")]
    assert tower
    taken = dict(ours.named_parameters())
    assert all(torch.equal(taken[name], wanted[name]) for name in tower)
    folder = first / "mini-blip2"  # the model itself, in half precision
    scripts.training.adopt_tower(ours, folder, second)
    assert scripts.common.read_progress(second, "tower").origin == "mini-blip2"
    assert all(torch.equal(taken[name], wanted[name].half().float()) for name in tower)
    narrow = {**recipe.vision, "intermediate_size": 32}
    other = scripts.training.Trainee(replace(recipe, vision=narrow), kb, CPU)
    with pytest.raises(UserError, match="a tower of another shape"):
        scripts.training.adopt_tower(other, first / "tower.safetensors", second)


# -- scoring ----------------------------------------------------------------------------------------------------


def test_scores_card_and_errors(scripts, trained, tmp_path):
    _, out = trained
    folder = folder_of(out)
    errors = tmp_path / "errors.jsonl"
    scores = scripts.score.score(
        folder, device="cpu", sample=12, batch_size=16, errors=errors
    )
    figures = scores["figures"]
    assert {
        "name",
        "kind",
        "country",
        "capital",
        "text",
        "held-out artist: name",
        "held-out concept: name",
    } <= set(figures)
    assert all(
        0 <= figure["value"] <= 1 and 0 < figure["n"] <= 36
        for figure in figures.values()
    )
    assert json.loads((folder / "scores.json").read_text())["figures"] == figures
    card = (folder / "README.md").read_text()
    assert "$" not in card
    assert "OpenMoji" in card
    assert str(out) not in card
    for line in scripts.data.lines(errors):
        assert (DATA / line["picture"]).exists()


def test_items_ask_every_figure_of_the_issue(scripts):
    kb = scripts.data.load_emojikb(None, 60, 150)
    asked = list(scripts.score.items(kb))
    counts = Counter(figure for item in asked for figure in item.figures)
    assert counts["held-out artist: name"] == 150
    assert counts["name"] == sum(
        counts[f"name by {artist}"]
        for artist in ("noto", "twemoji", "fluent", "openmoji")
    )
    assert counts["name"] == len(scripts.data.Pictures(kb, CPU).usable)
    assert counts["text"] == 3 * sum(
        ("it" in fact or "city" in fact) and kb.holdout.allows(fact["concept"])
        for fact in kb.facts
    )
    assert (
        len(
            {item.query.background for item in asked if item.figures[0] == "background"}
        )
        == 8
    )
    assert asked == list(scripts.score.items(kb))


@pytest.mark.nightly
@pytest.mark.parametrize("name", RECIPES)
def test_quick_mode_learns(scripts, name, tmp_path, monkeypatch):
    monkeypatch.setattr(
        scripts.runs.signal, "signal", lambda *_: None
    )  # Ctrl-C stays with pytest
    recipe = ROOT / "scripts" / f"{name}.yaml"
    assert (
        scripts.train.main(
            [str(recipe), "--out", str(tmp_path), "--quick", "--device", "cpu"]
        )
        == 0
    )
    scores = scripts.score.score(
        folder_of(tmp_path), device="cpu", sample=None, batch_size=64, errors=None
    )
    assert scores["figures"]["category"]["value"] > 0.5
