"""The image editors that come along do what their cards say, and the scripts that make and measure them work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, imported_scripts
from PIL import Image

from mmedit_cli import registry
from mmedit_cli.catalog import own_image_editors
from mmedit_cli.drawing.evaluation.artists import ArtistClassifier
from mmedit_cli.errors import ModelError
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.picture_editing.data import emojikb_edits
from mmedit_cli.picture_editing.evaluation.judge import Judge
from mmedit_cli.picture_editing.methods.base import EditJob
from mmedit_cli.runtime import LoadOptions

pytestmark = pytest.mark.slow
EDITORS = {"mini-ip2p": "instruct-pix2pix", "mini-mgie": "mgie"}
APPLE = "data/emojikb/noto/1f34e.png"


@pytest.fixture(scope="module")
def scripts():
    """The modules of the scripts, imported as the scripts do."""
    with imported_scripts(
        pack="pack_mini_mgie",
        score="score_mini_edits",
        artists="train_artist_classifier",
    ) as modules:
        yield modules


@pytest.fixture(scope="module", params=EDITORS)
def shipped(request):
    """(folder, loaded editor) of each model that comes along."""
    folder = own_image_editors()[request.param]
    cls = registry.image_editors.get(EDITORS[request.param])
    return folder, cls.load(request.param, LoadOptions(device="cpu"))


def test_the_card_says_what_was_measured(shipped, scripts):
    folder, editor = shipped
    measured = json.loads((folder / "scores.json").read_text())
    assert measured["n"] >= 1000
    card = (folder / "README.md").read_text()
    assert scripts.score.table(measured) in card
    assert "$" not in card
    assert "OpenMoji" in card
    settings = json.loads((folder / "settings.json").read_text())
    assert settings.items() <= measured["settings"].items()
    assert settings.items() <= vars(editor.defaults).items()
    assert (folder / "samples.webp").is_file()


def test_held_out_edits_are_made(shipped):
    """A sample of what the card is about, made and judged anew."""
    folder, editor = shipped
    measured = json.loads((folder / "scores.json").read_text())["by_kind"]["background"]
    pairs = [
        pair
        for pair in emojikb_edits.pairs("eval")
        if pair.kind == "background" and pair.answer
    ][:16]
    sources = [pair.source() for pair in pairs]
    jobs = [
        EditJob(source, pair.instruction)
        for source, pair in zip(sources, pairs, strict=True)
    ]
    made = [edited.picture for edited in editor.edit(jobs, batch_size=16)]
    reached = Judge(load_backbone("mini-blip2", device="cpu")).reached(made, pairs)
    told = [value for value in reached if value is not None]
    assert len(told) > 12
    assert sum(told) / len(told) >= measured["reached"]["mean"] - 20


@pytest.mark.parametrize("editor", EDITORS.values())
def test_the_background_becomes_blue_out_of_the_box(editor, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    named = [] if editor == "mgie" else ["--model", "mini-ip2p"]
    out = tmp_path / "out.png"
    words = [
        "image-edit",
        editor,
        "--image",
        APPLE,
        "make the background blue",
        "-o",
        str(out),
        *named,
    ]
    code, _, err = cli(*words, "--records", str(tmp_path))
    assert code == 0, err
    with Image.open(out) as picture:
        assert picture.size == (64, 64)
        corner, middle = picture.getpixel((2, 2)), picture.getpixel((32, 40))
    assert corner[2] > corner[0] + 20, "blue"
    assert middle[0] > middle[2] + 60, "the apple is still red"


def test_what_the_language_model_says_does_not_depend_on_company(shipped):
    """Rows of one batch end at different places, with the first visual token."""
    _, editor = shipped
    if not editor.derives:
        return
    kinds = {pair.kind: pair for pair in reversed(emojikb_edits.pairs("eval")[:200])}
    pairs = [
        kinds[kind]
        for kind in ("background", "style", "bigger", "opposite-background", "turn")
    ]
    jobs = [EditJob(pair.source(), pair.instruction) for pair in pairs]
    together = editor.write(jobs)
    assert len({len(written.text) for written in together}) > 2
    assert together == [editor.write([job])[0] for job in jobs]
    assert {written.source for written in together} == {"model"}


def test_the_artists_of_things_never_seen_are_told_apart(scripts):
    drawings = scripts.artists.Drawings()
    assert scripts.artists.accuracy(ArtistClassifier.load(), drawings, "eval") > 0.9
    once, again = (scripts.artists.train(drawings, 3).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, again[name]) for name, tensor in once.items())


def test_a_training_is_packed_in_half_precision(scripts, tmp_path):
    folder = own_image_editors()["mini-mgie"]
    weights = folder / "editor.safetensors"
    assert (
        weights.stat().st_size
        < 2.1 * json.loads((folder / "training.json").read_text())["parameters"]
        + 60_000
    )
    with pytest.raises(Exception, match="not a finished training"):
        scripts.pack.pack(tmp_path, tmp_path / "out", {})
    assert not (tmp_path / "out").exists()


def test_another_pipeline_than_it_was_trained_from_is_refused(tmp_path, monkeypatch):
    copies = tmp_path / "models"
    shutil.copytree(ROOT / "data" / "models" / "mini-mgie", copies / "mini-mgie")
    shutil.copytree(ROOT / "data" / "models" / "mini-ip2p", copies / "mini-ip2p")
    config = copies / "mini-ip2p" / "unet" / "config.json"
    config.write_text(config.read_text() + "\n")
    own = {"mini-ip2p": copies / "mini-ip2p"}
    monkeypatch.setattr(
        "mmedit_cli.picture_editing.methods.shared.loading.own_image_editors",
        lambda: own,
    )
    with pytest.raises(
        Exception, match="mini-ip2p is not the pipeline it was trained from"
    ):
        registry.image_editors.get("mgie").load(
            str(copies / "mini-mgie"), LoadOptions(device="cpu")
        )


def test_they_are_listed_and_take_no_other_place(cli):
    code, out, _ = cli("list", "--json")
    assert code == 0
    rows = {row["model"]: row for row in json.loads(out)["models"]}
    assert {rows[name]["family"] for name in EDITORS} == {"changes pictures"}
    for name in EDITORS:
        with pytest.raises(ModelError):
            load_backbone(name, device="cpu")
    assert Path(own_image_editors()["mini-ip2p"]).name == "mini-ip2p"
