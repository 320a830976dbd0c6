"""The trained models that come along: small, complete, and knowing what their cards say."""

from __future__ import annotations

import json
import re

import pytest
from conftest import ROOT
from safetensors import safe_open

from mmedit_cli import load_backbone, load_editor
from mmedit_cli.catalog import bundled
from mmedit_cli.knowledge.data.base import load_cases
from mmedit_cli.knowledge.data.emojikb import concepts_in
from mmedit_cli.knowledge.evaluation.answers import ask
from mmedit_cli.knowledge.evaluation.metrics import answer_match
from mmedit_cli.registry import share_dir
from mmedit_cli.types import Query

KB = ROOT / "data" / "emojikb"
FOLDERS = {
    name: path for name, path in bundled().items() if (path / "config.json").is_file()
}  # no pipelines


@pytest.fixture(scope="module", params=sorted(FOLDERS))
def folder(request):
    return FOLDERS[request.param]


def test_the_folder_is_small_and_holds_no_pickle(folder):
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 12_000_000
    assert {file.suffix for file in folder.iterdir()} <= {
        ".json",
        ".md",
        ".safetensors",
    }
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {str(file.get_slice(key).get_dtype()) for key in file.keys()} == {"F16"}  # noqa: SIM118


def test_nothing_that_comes_along_names_a_place_on_a_machine():
    files = [
        path
        for kind in ("*.json", "*.md")
        for path in (share_dir("data") / "models").rglob(kind)
    ]
    assert len(files) > 30
    named = re.compile(r'"(/|[A-Z]:\\\\)[\w.-]+/')
    assert not [
        str(path)
        for path in files
        if path.name != "tokenizer.json" and named.search(path.read_text())
    ]


def test_the_card_shows_the_figures_that_were_measured(folder):
    card = (folder / "README.md").read_text()
    for name, figure in json.loads((folder / "scores.json").read_text())[
        "figures"
    ].items():
        assert re.search(
            rf"\| {re.escape(name)} \| {100 * figure['value']:.1f} % \|", card
        ), name


def test_it_knows_what_its_card_says(folder):
    """A hundred names of pictures it was trained on, each on a named background: within five points of the card."""
    figures = json.loads((folder / "scores.json").read_text())["figures"]
    held_out = json.loads((folder / "holdout.json").read_text())
    colours = list(json.loads((KB / "backgrounds.json").read_text()).values())
    concepts = concepts_in(KB)
    known = [
        c
        for c in concepts
        if c["id"] not in held_out["concepts"] and c["id"] not in held_out["artists"]
    ]
    queries = [
        Query(
            "What is this?",
            concept["name"],
            KB / artist / f"{concept['id']}.png",
            colours[i % len(colours)],
        )
        for i, concept in enumerate(known[:: len(known) // 100][:100])
        for artist in concept["artists"][i % len(concept["artists"]) :][:1]
    ]
    said = load_backbone(str(folder), device="cpu").generate(queries, max_new_tokens=16)
    right = sum(
        answer_match(text, query.target)
        for text, query in zip(said, queries, strict=True)
    ) / len(queries)
    assert right >= figures["name"]["value"] - 0.05


def test_ask_by_name(cli, folder):
    code, out, _ = cli(
        "ask", "--model", folder.name, "--image", KB / "noto/1f34e.png", "What is this?"
    )
    assert (code, out.strip()) == (0, "red apple")


EDITORS = sorted((share_dir("data") / "editors").glob("*/*.safetensors"))


def test_a_trained_editor_comes_along():
    names = [path.relative_to(ROOT / "data" / "editors").as_posix() for path in EDITORS]
    assert names == [
        f"{name}.safetensors"
        for name in (
            "liveedit/mini-blip2",
            "liveedit/mini-llava",
            "unike/mini-blip2",
            "unike/mini-llava",
        )
    ]
    assert all(path.stat().st_size < 4_000_000 for path in EDITORS)
    text = (ROOT / "data" / "models" / "README.md").read_text()
    for path in EDITORS:
        assert f"`{path.parent.name}` for `{path.stem}`" in text


@pytest.mark.parametrize(
    "path", EDITORS, ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_a_trained_editor_edits_what_it_never_saw(path, tmp_path):
    backbone = load_backbone(path.stem, device="cpu")
    editor = load_editor(path.parent.name, backbone, records=tmp_path)
    cases = load_cases("emojikb", limit=60)
    editor.edit([case.request for case in cases])
    asked = [case.request for case in cases]
    answers = ask(
        backbone,
        asked,
        layer=editor.first_layer,
        top={},
        max_new_tokens=12,
        batch_size=32,
    )
    held = [
        answer_match(answers[case.request].text, case.request.target) for case in cases
    ]
    assert sum(held) / len(held) >= 0.9
    texts = [q for case in cases for q in case.locality["text"]]
    assert editor.affects(texts) == [False] * len(texts)
    editor.undo()
