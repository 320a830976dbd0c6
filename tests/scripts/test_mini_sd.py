"""The scripts that train and score mini-sd: what is shown, that a stop changes nothing, that the folder draws."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, imported_scripts
from PIL import Image
from safetensors.torch import load_file

from mmedit_cli import runtime
from mmedit_cli.errors import UserError
from mmedit_cli.pictures import Picture, load_picture

pytestmark = pytest.mark.slow
DATA = ROOT / "data" / "emojikb"
CPU = torch.device("cpu")
RECIPE = ROOT / "scripts" / "mini_sd.yaml"


@pytest.fixture(scope="module")
def scripts():
    """The modules of the scripts, imported as the scripts do."""
    with imported_scripts(
        common="mini_training",
        runs="mini_runs",
        data="mini_sd_data",
        model="mini_sd_model",
        training="mini_sd_training",
        score="score_mini_sd",
        train="train_mini_sd",
    ) as modules:
        runtime.quiet_libraries()
        yield modules


@pytest.fixture(scope="module")
def drawn(scripts):
    """What the real recipe shows."""
    return scripts.data.load_drawn(**scripts.model.Recipe.read(RECIPE).data)


def short(scripts):
    """The quick recipe with a few steps."""
    recipe = scripts.model.Recipe.read(RECIPE, quick=True)
    stages = {name: replace(recipe.stages[name], passes=2) for name in recipe.stages}
    return replace(recipe, stages=stages)


@pytest.fixture(scope="module")
def trained(scripts, tmp_path_factory):
    """A run of some seconds without a stop."""
    out = tmp_path_factory.mktemp("mini_sd")
    recipe = short(scripts)
    stop = scripts.runs.Stop()
    assert scripts.train.train(recipe, out, device=CPU, stages=recipe.STAGES, stop=stop)
    return out


@pytest.fixture(scope="module")
def pipe(trained):
    from diffusers import StableDiffusionPipeline

    loaded = StableDiffusionPipeline.from_pretrained(trained / "mini-sd")
    loaded.set_progress_bar_config(disable=True)
    return loaded


# -- what it is shown -------------------------------------------------------------------------------------------


def test_nothing_held_out_is_shown(scripts, drawn):
    judge = json.loads(
        (ROOT / "data" / "models" / "mini-blip2" / "holdout.json").read_text()
    )
    out = {c["id"] for c in drawn.held_out}
    assert len(out) == 20
    assert out.isdisjoint(judge["concepts"])  # the judge can name them
    assert all(len(c["artists"]) == 4 for c in drawn.held_out)
    assert {c["kind"] for c in drawn.held_out} <= {c["kind"] for c in drawn.concepts}
    trainee = scripts.training.Trainee(short(scripts), drawn, CPU)
    for stage, drawings in (
        ("vae", drawn.kb.drawings),
        ("diffusion", [(c["id"], a) for c, a in drawn.drawings]),
    ):
        shown = {drawings[i] for i in trainee.usable(stage).tolist()}
        assert len(shown) == len(trainee.usable(stage))
        assert not {c for c, _ in shown} & (out | set(judge["concepts"]))
        assert not any(judge["artists"].get(c) == a for c, a in shown)
    assert len(trainee.usable("diffusion")) == len(drawn.drawings) > 800
    assert [drawn.kb.drawings[i] for i in trainee.rows.tolist()] == [
        (c["id"], a) for c, a in drawn.drawings
    ]


def test_the_choice_is_by_hash(scripts, drawn):
    again = scripts.data.load_drawn(**scripts.model.Recipe.read(RECIPE).data)
    assert [c["id"] for c in again.held_out] == [c["id"] for c in drawn.held_out]
    few = scripts.data.load_drawn(**scripts.model.Recipe.read(RECIPE, quick=True).data)
    assert len(few.concepts) == 6


def test_captions_say_what_is_there(scripts, drawn):
    tokenizer = scripts.model.build_tokenizer(drawn.texts())
    captions = scripts.data.Captions(drawn, tokenizer)
    chosen = torch.randint(
        len(drawn.drawings), (2000,), generator=torch.Generator().manual_seed(1)
    )
    colour = torch.randint(9, (2000,), generator=torch.Generator().manual_seed(2))
    texts = captions.write(chosen, colour, torch.Generator().manual_seed(3))
    assert texts == captions.write(chosen, colour, torch.Generator().manual_seed(3))
    kinds = 0
    for text, i, k in zip(texts, chosen.tolist(), colour.tolist(), strict=True):
        concept, artist = drawn.drawings[i]
        if not text:
            continue
        kinds += concept["it"] not in text
        assert concept["it"] in text or scripts.data.article(concept["kind"]) in text
        if "background" in text:
            assert text.endswith(f" {list(drawn.grounds)[k]} background")
        if "drawing" in text:
            assert text.startswith(
                ("a drawing of", scripts.data.article(artist) + " drawing of")
            )
    assert 0.07 < texts.count("") / 2000 < 0.13
    assert 0.07 < kinds / 2000 < 0.13
    assert "a orange" not in " ".join(texts)
    assert captions.encode(texts).shape == (2000, scripts.model.LONGEST)


def test_two_things_stand_beside_each_other_and_are_both_named(scripts, drawn):
    recipe = scripts.model.Recipe.read(RECIPE)
    assert recipe.stages["scenes"].pairs > 0 == recipe.stages["diffusion"].pairs
    trainee = scripts.training.Trainee(recipe, drawn, CPU)
    left, right, grounds = trainee.rows[:2], trainee.rows[2:4], trainee.drawn.grounds
    scene = scripts.data.side_by_side(
        trainee.pictures, left, right, scripts.data.colours([grounds["blue"]] * 2, left)
    )
    assert scene.shape == (2, 3, 64, 64)
    whole = scripts.data.on_colour(trainee.pictures, left, grounds["blue"])
    half = torch.nn.functional.avg_pool2d(whole, 2)
    assert (scene[:, :, 16:48, :32] - half).abs().max() < 0.01
    assert torch.equal(scene[:, :, :16], scene[:, :, :1, :1].expand(-1, -1, 16, 64))
    beside = torch.tensor([5, -1])
    texts = trainee.captions.write(
        torch.tensor([0, 1]),
        torch.tensor([0, 0]),
        torch.Generator().manual_seed(0),
        beside,
    )
    assert [" and " in text for text in texts] == [True, False]
    assert drawn.drawings[5][0]["it"] in texts[0]


def test_a_second_drawing_is_of_the_same_artist(scripts, drawn):
    trainee = scripts.training.Trainee(scripts.model.Recipe.read(RECIPE), drawn, CPU)
    chosen = torch.arange(400)
    beside = trainee._beside(chosen, 0.4, torch.Generator().manual_seed(0))
    assert 0.3 < (beside >= 0).float().mean() < 0.5
    for i, j in zip(chosen.tolist(), beside.tolist(), strict=True):
        assert j < 0 or drawn.drawings[i][1] == drawn.drawings[j][1]
    assert (trainee._beside(chosen, 0.0, torch.Generator()) < 0).all()


def test_tokenizer_has_a_token_for_each_word_and_spells_the_rest(scripts, drawn):
    tokenizer = scripts.model.build_tokenizer(drawn.texts())
    for word in (
        "lion",
        "mammal",
        "fruit",
        "bird",
        "blue",
        "Twemoji",
        "drawing",
        "tomato",
    ):
        assert len(tokenizer.tokenize(word)) == 1, word
    strange = "<my-Üñ> of 7 #q"
    ids = tokenizer(strange)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 0
    assert (
        ids[1:].count(tokenizer.eos_token_id) == 1
    )  # nothing is unknown: that too would be the end token
    longest = max(
        len(
            tokenizer(
                scripts.data.caption(scripts.data.FULL, c["it"], "orange", "openmoji")
            )["input_ids"]
        )
        for c in (*drawn.concepts, *drawn.held_out)
    )
    assert longest <= scripts.model.LONGEST


def test_pictures_are_those_that_the_judge_sees(scripts, trained, drawn):
    trainee = scripts.training.Trainee(short(scripts), drawn, CPU)
    concept, artist = drawn.drawings[7]
    for colour in drawn.grounds.values():
        made = scripts.data.on_colour(trainee.pictures, trainee.rows[7:8], colour)[0]
        image = load_picture(Picture(DATA / artist / f"{concept['id']}.png", colour))
        wanted = (
            torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            .view(64, 64, 3)
            .permute(2, 0, 1)
        )
        assert (
            (made + 1) * 127.5 - wanted
        ).abs().max() < 1.01  # at most one of 256 levels


# -- training ---------------------------------------------------------------------------------------------------


def test_a_stop_changes_no_bit(scripts, trained, tmp_path):
    recipe, stops = short(scripts), 0
    while not scripts.train.train(
        recipe,
        tmp_path,
        device=CPU,
        stages=recipe.STAGES,
        stop=scripts.runs.Stop(steps=3),
    ):
        stops += 1
    assert stops >= 2
    for stage in recipe.STAGES:
        once, continued = (
            load_file(out / f"{stage}.safetensors") for out in (trained, tmp_path)
        )
        assert once.keys() == continued.keys()
        assert all(torch.equal(once[key], continued[key]) for key in once), stage
    model = "unet/diffusion_pytorch_model.safetensors"
    assert (trained / "mini-sd" / model).read_bytes() == (
        tmp_path / "mini-sd" / model
    ).read_bytes()


def test_each_stage_trains_its_own_part(scripts, trained):
    vae, diffusion = (
        load_file(trained / f"{stage}.safetensors") for stage in ("vae", "diffusion")
    )
    for key, value in vae.items():
        if not key.startswith("optimizer/"):
            moved = not torch.equal(value, diffusion[key])
            assert (
                moved
                or not key.startswith(("unet.", "text_encoder.", "mean."))
                or value.abs().max() == 0
            ), key
            assert not (moved and key.startswith("vae.")), key


def test_another_recipe_is_not_continued(scripts, trained):
    recipe = replace(short(scripts), seed=99)
    with pytest.raises(UserError, match="from another recipe"):
        scripts.train.train(
            recipe, trained, device=CPU, stages=("diffusion",), stop=scripts.runs.Stop()
        )


def test_latents_have_unit_spread_and_the_pipeline_undoes_it(scripts, trained, pipe):
    trainee = scripts.training.Trainee(
        short(scripts), scripts.data.load_drawn(**short(scripts).data), CPU
    )
    stage = trainee.select("diffusion")
    scripts.common.load(trainee, stage, None, "diffusion", trained)
    latents = trainee.latents()
    assert latents.shape == (len(trainee.rows), 9, 4, 16, 16)
    assert latents.std().item() == pytest.approx(1, abs=1e-3)
    assert (
        pipe.vae.config.scaling_factor == trainee.vae.config.scaling_factor != 0.18215
    )


def test_the_real_recipe_fits_the_repository(scripts, drawn):
    recipe = scripts.model.Recipe.read(RECIPE)
    parts = scripts.model.build(recipe, scripts.model.build_tokenizer(drawn.texts()))
    assert (
        sum(p.numel() for part in parts for p in part.parameters()) * 2 < 8.5e6
    )  # bytes in float16


# -- the folder -------------------------------------------------------------------------------------------------


def test_the_folder_draws_the_same_for_a_seed(pipe):
    def draw(seed: int, text: str = "a twemoji drawing of a lion on a blue background"):
        generator = torch.Generator().manual_seed(seed)
        return pipe(
            text,
            num_inference_steps=3,
            guidance_scale=2.0,
            generator=generator,
            output_type="pt",
        ).images

    first = draw(1)
    assert first.shape == (1, 3, 64, 64)
    assert torch.isfinite(first).all()
    assert torch.equal(first, draw(1))
    assert not torch.equal(first, draw(2))
    assert not torch.equal(first, draw(1, "a drawing of a pear"))


def test_the_folder_is_small_whole_and_needs_nothing_else(scripts, trained, pipe):
    folder = trained / "mini-sd"
    assert pipe.safety_checker is None
    assert pipe.unet.dtype == pipe.text_encoder.dtype == pipe.vae.dtype == torch.float32
    assert {str(f.relative_to(folder)) for f in folder.rglob("*.safetensors")} == {
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }
    exact = load_file(trained / "scenes.safetensors")
    for key, parameter in pipe.unet.named_parameters():
        assert torch.equal(parameter, exact[f"mean.unet.{key}"].half().float()), key
    for key, parameter in pipe.text_encoder.named_parameters():
        assert torch.equal(
            parameter, exact[f"mean.text_encoder.{key}"].half().float()
        ), key
    written = json.loads((folder / "concepts.json").read_text())
    data = scripts.data.load_drawn(**short(scripts).data)
    assert written["held_out"] == {c["id"]: c["name"] for c in data.held_out}
    assert written["taught"] == [c["id"] for c in data.concepts]


def test_training_and_pipeline_agree_on_the_text(scripts, trained, pipe):
    data = scripts.data.load_drawn(**short(scripts).data)
    captions = scripts.data.Captions(data, scripts.model.build_tokenizer(data.texts()))
    texts = ["a noto drawing of a lion on a pink background", ""]
    with torch.no_grad():
        ours = pipe.text_encoder(captions.encode(texts)).last_hidden_state
        theirs, _ = pipe.encode_prompt(texts, "cpu", 1, False)
    assert torch.equal(ours, theirs)


# -- scoring ----------------------------------------------------------------------------------------------------


def test_scores_card_and_sheet(scripts, trained, tmp_path):
    folder = trained / "mini-sd"
    scores = scripts.score.score(
        folder,
        device="cpu",
        sample=3,
        steps=2,
        guidance=2.0,
        keep=tmp_path / "pictures",
    )
    figures = scores["figures"]
    assert {
        "name",
        "kind",
        "background",
        "held-out concept: name",
        "kind in place of a name: kind",
    } <= set(figures)
    assert figures["name"]["target"] == 0.6
    assert (
        figures["the drawing itself: name"]["value"] == 1.0
    )  # the judge knows the originals
    assert all(
        0 <= figure["value"] <= 1 and 0 < figure["n"] <= 12
        for figure in figures.values()
    )
    assert json.loads((folder / "scores.json").read_text())["figures"] == figures
    card = (folder / "README.md").read_text()
    assert "$" not in card
    assert "OpenMoji" in card
    assert str(trained) not in card
    with Image.open(folder / "samples.webp") as sheet:
        assert sheet.width == scripts.score.LABEL + 8 * 64
        assert (sheet.height - 20) in range(64, 7 * 64, 64)
    answers = (tmp_path / "pictures" / "answers.jsonl").read_text().splitlines()
    assert len(answers) == sum(figure["n"] for figure in figures.values())


def test_wishes_cover_every_drawing_once(scripts, drawn):
    wanted = list(scripts.score.wishes(drawn))
    named = [wish for wish in wanted if wish.asks[0][0] == "name"]
    assert len(named) == len(drawn.drawings)
    assert len({wish.caption for wish in named}) == len(named)
    assert len({wish.seed for wish in named}) == len(named)
    held = [wish for wish in wanted if wish.asks[0][0] == "held-out concept: name"]
    assert len(held) == 80
    assert {wish.source for wish in wanted} == {"", *scripts.score.SOURCES}


@pytest.mark.nightly
def test_quick_mode_learns(scripts, tmp_path, monkeypatch):
    monkeypatch.setattr(
        scripts.runs.signal, "signal", lambda *_: None
    )  # Ctrl-C stays with pytest
    assert (
        scripts.train.main(
            [str(RECIPE), "--out", str(tmp_path), "--quick", "--device", "cpu"]
        )
        == 0
    )
    lines = [
        json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
    ends = {line["stage"]: line for line in lines}
    assert ends["vae"]["loss"] < 0.5
    assert ends["diffusion"]["loss"] < 0.6  # 1 is what guessing nothing costs


@pytest.mark.nightly
def test_the_model_that_comes_along_draws_what_its_card_says(scripts, tmp_path):
    """A sample of the captions of its card, drawn and judged anew: near what was measured on all of them."""
    shipped = ROOT / "data" / "models" / "mini-sd"
    measured = json.loads((shipped / "scores.json").read_text())
    assert measured["figures"]["name"]["value"] >= 0.6
    assert measured["figures"]["background"]["value"] >= 0.8
    card = (shipped / "README.md").read_text()
    for name, figure in measured["figures"].items():
        assert f"| {name} | {100 * figure['value']:.1f} % |" in card, name
    copy = shutil.copytree(shipped, tmp_path / "mini-sd")
    options = {
        "steps": measured["steps"],
        "guidance": measured["guidance"],
        "device": "cpu",
    }
    figures = scripts.score.score(copy, sample=20, **options)["figures"]
    assert figures["name"]["value"] >= measured["figures"]["name"]["value"] - 0.25
    assert figures["background"]["value"] >= 0.85
