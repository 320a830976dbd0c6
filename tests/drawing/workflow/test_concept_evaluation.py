"""`mmedit eval` for personalizers: on tiny models, killed and continued, and what it says."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from conftest import page_data
from PIL import Image

from mmedit_cli.app import main
from mmedit_cli.drawing.covariance import Covariance, default_path
from mmedit_cli.drawing.data import emojikb_concepts
from mmedit_cli.drawing.methods.base import Personalizer
from mmedit_cli.drawing.models import tiny
from mmedit_cli.drawing.models.loading import load_stable_diffusion
from mmedit_cli.drawing.models.stable_diffusion import StableDiffusion
from mmedit_cli.drawing.workflow.concepts import ConceptFolder
from mmedit_cli.picture_editing.methods.shared import tiny as image_tiny

REPEATING = ("dreambooth", "dreambooth-lora", "perfusion")
EDITORS = (
    "multi-melo-diffusion",
    *(pytest.param(name, marks=pytest.mark.slow) for name in REPEATING),
)
FEW = (
    "--device",
    "cpu",
    "--set",
    "steps=3",
    "--set",
    "eval.steps=1",
    "--set",
    "eval.seeds=2",
    "--set",
    "eval.batch_size=3",
    "--set",
    "eval.encoder=tiny-blip2",
)
SET = """
subjects: {mug: teapot, rex: dog}
generality: ["a {} in the snow", "a red {}"]
locality: ["a green boot", "a cat on a table"]
"""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A place where the covariance is found, so that it need not be computed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMEDIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        model = load_stable_diffusion("tiny-sd", device="cpu")
        path = default_path(model)
        path.parent.mkdir()
        source = {"encoder": model.text_fingerprint}
        Covariance(torch.eye(32).double(), source=source).save(path)
        yield


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    """Two subjects with two photos each."""
    folder = tmp_path_factory.mktemp("subjects") / "set"
    for name, colour in (("mug", (200, 30, 30)), ("rex", (30, 30, 200))):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            shade = (*colour[:2], colour[2] + 20 * i)
            Image.new("RGB", (20, 20), shade).save(folder / name / f"{i}.png")
    (folder / "subjects.yaml").write_text(SET)
    return folder


def words_of(editor, subjects):
    return ("eval", editor, "--model", "tiny-sd", "--data", subjects, *FEW)


@pytest.fixture
def evaluate(cli, subjects):
    return lambda editor, *more: cli(*words_of(editor, subjects), *more)


@pytest.fixture(scope="module")
def finished(subjects, tmp_path_factory):
    """Evaluate an editor, once for all tests: `finished(editor)` -> the folder of its records; it is only copied."""

    @functools.cache
    def records_of(editor):
        records = tmp_path_factory.mktemp(editor) / "records"
        words = (*words_of(editor, subjects), "--records", records)
        assert main(list(map(str, words))) == 0
        return records

    return records_of


@pytest.fixture
def evaluated(finished, evaluate, tmp_path):
    """Put a finished evaluation among the records of a test: `evaluated(editor)` -> its report."""

    def report(editor):
        records = tmp_path / "records"
        shutil.copytree(finished(editor), records, dirs_exist_ok=True)
        return report_of(evaluate(editor, "--json"))

    return report


def report_of(result):
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def means(report, side, test):
    return {
        name: found["mean"]
        for name, found in report["sides"][side].get(test, {}).items()
    }


def test_routed_oracle_and_always_on_stand_beside_each_other(
    evaluated, evaluate, cli, tmp_path
):
    report = evaluated("multi-melo-diffusion")
    assert set(report["sides"]) == {"photos", "base", "routed", "oracle", "always-on"}
    for side in ("routed", "oracle"):
        assert (
            means(report, side, "other")["identical"]
            == means(report, side, "class")["identical"]
            == 100
        )
        assert means(report, side, "other")["tiny-blip2-I paired"] == pytest.approx(
            100, abs=1e-3
        )
        assert means(report, side, "other")["tiny-blip2-I all pairs"] == pytest.approx(
            means(report, "base", "other")["tiny-blip2-I all pairs"]
        )
    assert means(report, "always-on", "other")["identical"] == 0
    assert report["sides"]["routed"]["reliability"]["tiny-blip2-I"]["n"] == 2
    assert report["sides"]["routed"]["other"]["L1"]["n"] == 2, (
        "two prompts, drawn once with all subjects loaded"
    )
    assert report["routing"]["reliability"] == report["routing"]["pair"] == {"right": 1}
    assert report["routing"]["class"] == report["routing"]["other"] == {"none": 1}
    assert report["data"]["cases"] == len(report["concepts"]) == 2
    (run,) = {path.parent for path in (tmp_path / "records").rglob("report.json")}
    assert ConceptFolder.existing(run / "concepts").tokens == ["<mug>", "<rex>"]
    named = pixels(run / "pictures" / "routed" / "rex.reliability" / "00-0.png")
    assert np.array_equal(
        named, pixels(run / "pictures" / "oracle" / "rex.reliability" / "00-0.png")
    )
    assert not np.array_equal(
        named, pixels(run / "pictures" / "always-on" / "rex.reliability" / "00-0.png")
    )
    code, out, err = evaluate("multi-melo-diffusion")
    assert (code, "already done" in err, "always-on" in out) == (0, True, True)
    assert "always-on" in cli("report", run)[1]
    assert "2 subjects" in cli("report")[1]


def test_the_gallery_shows_every_subject(evaluated, cli, tmp_path):
    evaluated("multi-melo-diffusion")
    (page,) = (tmp_path / "records").rglob("index.html")
    assert {path.name for path in page.parent.glob("*.png")} == {"mug.png", "rex.png"}
    shown = page_data(page)
    links = shown["pictures"]
    assert len(links) > 2 * 2 + 2 * 4 * 3
    assert all((page.parent / unquote(link)).is_file() for link in links)
    titles = [card["title"] for card in shown["cards"]]
    assert {"a photo of a <rex>", "a photo of a <mug> and a <rex>"} <= set(titles)
    captions = [name for card in shown["cards"] for name, _ in card["groups"]]
    assert captions.count("always-on") == captions.count("base") == 2 * 4 + 1 + 2
    viewed = tmp_path / "viewed.html"
    assert cli("report", "view", page.parent.parent, "--out", viewed)[0] == 0
    captions = [
        name for card in page_data(viewed)["cards"] for name, _ in card["groups"]
    ]
    assert "always-on: a photo of a <rex>" in captions


@pytest.mark.parametrize("editor", EDITORS)
def test_a_killed_run_ends_with_the_same_report(
    evaluated, evaluate, editor, tmp_path, monkeypatch
):
    whole = evaluated(editor)
    drawn, learned = StableDiffusion.generate, Personalizer.learn
    calls, taught = [], []

    def stops(self, *words, **more):
        calls.append(1)
        if len(calls) in (4, 16):
            raise KeyboardInterrupt
        return drawn(self, *words, **more)

    def noted(self, concept, **more):
        taught.append(concept.token)
        return learned(self, concept, **more)

    monkeypatch.setattr(StableDiffusion, "generate", stops)
    monkeypatch.setattr(Personalizer, "learn", noted)
    codes = [
        evaluate(editor, "--json", "--records", tmp_path / "again")[0] for _ in range(2)
    ]
    assert codes == [130, 130]
    again = report_of(evaluate(editor, "--json", "--records", tmp_path / "again"))
    for report in (whole, again):
        for key in ("cost", "run", "gallery", "environment"):
            report.pop(key)
    assert again == whole
    assert sorted(taught) == ["<mug>", "<rex>"], "each was learned once"


def test_methods_that_are_always_on_are_measured_one_subject_at_a_time(
    evaluated, tmp_path
):
    report = evaluated("dreambooth")
    assert "pair" not in report["sides"]["edited"], "a model holds one"
    assert report["sides"]["edited"]["other"]["identical"] == {
        "mean": 0,
        "n": 2,
        "ci95": None,
    }
    assert not list((tmp_path / "records").rglob("concepts/*/*.safetensors")), (
        "copies of all weights are not kept"
    )
    report = evaluated("dreambooth-lora")
    assert means(report, "edited", "pair").keys() == {
        "both by tiny-blip2",
        "one at least by tiny-blip2",
    }
    assert means(report, "edited", "other")["identical"] < 100
    report = evaluated("perfusion")
    assert (
        means(report, "edited", "other")["identical"]
        == means(report, "edited", "class")["identical"]
        == 100
    )


def test_things_that_a_model_was_never_shown(cli, tmp_path, monkeypatch):
    read = emojikb_concepts.read
    monkeypatch.setattr(
        emojikb_concepts,
        "read",
        lambda model: replace(read(model), gallery=read(model).gallery[:200]),
    )
    monkeypatch.setattr(
        emojikb_concepts, "_GENERALITY", ("a {}",)
    )  # this model reads 24 letters
    model = tmp_path / "small-sd"
    tiny.build("tiny-sd").save_pretrained(model)
    told = {
        "taught": ["1f412", "1f98d"],
        "held_out": {"1f42b": "two-hump camel", "1f428": "koala"},
    }
    (model / "concepts.json").write_text(json.dumps(told))
    words = (
        "eval",
        "multi_melo_diffusion",
        "--model",
        model,
        *FEW[:-1],
        "eval.encoder=mini-blip2",
        "--json",
    )
    report = report_of(cli(*words, "--set", "steps=1", "--set", "eval.seeds=1"))
    assert report["data"]["name"] == "emojikb-concepts"
    assert report["settings"]["guidance"] == 2
    assert report["nameless"] == ["koala"], "mini-blip2 never learned that name"
    found = report["sides"]["routed"]["reliability"]
    assert {name: score["n"] for name, score in found.items()} == {
        "mini-blip2-I": 2,
        "nearest by mini-blip2": 2,
        "named by mini-blip2": 1,
        "recognised by mini-blip2": 2,
    }
    assert report["sides"]["photos"]["reliability"]["mini-blip2-I"]["mean"] > 20


def test_encoders_of_the_hub_have_columns_of_their_own(evaluate, tmp_path):
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, ViTConfig, ViTModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = image_tiny.text_encoder().config.to_dict()
    clip = CLIPModel(
        CLIPConfig(
            text_config=text,
            projection_dim=16,
            vision_config=vision | {"image_size": 32},
        )
    )
    clip.save_pretrained(tmp_path / "clip")
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    CLIPProcessor(processor, image_tiny.clip_tokenizer()).save_pretrained(
        tmp_path / "clip"
    )
    ViTModel(ViTConfig(image_size=224, patch_size=32, **vision)).save_pretrained(
        tmp_path / "dino"
    )
    words = (
        "--set",
        f"eval.clip={tmp_path / 'clip'}",
        "--set",
        f"eval.dino={tmp_path / 'dino'}",
        "--limit",
        "1",
    )
    report = report_of(
        evaluate("perfusion", *words, "--set", "eval.encoder=none", "--json")
    )
    columns = {"CLIP-I", "nearest by CLIP", "CLIP-T", "DINO-I", "nearest by DINO"}
    assert (
        set(means(report, "edited", "reliability"))
        == set(means(report, "base", "reliability"))
        == columns
    )
    assert means(report, "edited", "other")["DINO-I paired"] == pytest.approx(
        100, abs=1e-3
    )
    assert report["settings"]["clip"] == str(tmp_path / "clip")


def test_a_plan_costs_nothing(evaluate, tmp_path):
    plan = report_of(evaluate("multi-melo-diffusion", "--dry-run", "--json"))
    # of each subject 1 + 2 + 1 prompts on 3 sides and 1 + 2 by the base model, 2 others and 1 pair by all; 2 seeds
    assert plan["pictures"] == 2 * (3 * (2 * 4 + 2 + 1) + 2 * 3 + 2 + 1)
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("perfusion", "--set", "eval.stepz=3"), "did you mean eval.steps"),
        (("perfusion", "--set", "eval.seeds=0"), "eval.seeds=0: must be above 0"),
        (("perfusion", "--set", "stepz=3"), "did you mean steps"),
        (("perfusion", "--set", "eval.clip=nowhere/none"), "cannot be loaded"),
        (("perfusion", "--set", "eval.encoder=none"), "nothing looks at the pictures"),
        (("perfusion", "--sequential", "3"), "means nothing to a personalizer"),
        (("perfusion", "--model", "tiny-blip2"), "draws nothing"),
        (("perfusion", "--data", "nowhere"), "no subjects there"),
        (("perfusion", "--dtype", "float16"), "small gradients vanish"),
    ],
)
def test_wrong_input_is_one_line(evaluate, tmp_path, words, said):
    code, _, err = evaluate(*words)
    assert (code, said in err) == (2, True), err
    assert not (tmp_path / "records").exists()
