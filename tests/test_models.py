"""The trained models that come along: small, complete, and knowing what their cards say."""

from __future__ import annotations

import json
import re

import pytest
from conftest import ROOT
from safetensors import safe_open

from mmedit_cli import load_backbone
from mmedit_cli.catalog import bundled
from mmedit_cli.evaluation.metrics import answer_match
from mmedit_cli.types import Query

KB = ROOT / "data" / "emojikb"
FOLDERS = bundled()


@pytest.fixture(scope="module", params=sorted(FOLDERS))
def folder(request):
    return FOLDERS[request.param]


def test_the_folder_is_small_and_holds_no_pickle(folder):
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 12_000_000
    assert {file.suffix for file in folder.iterdir()} <= {".json", ".md", ".safetensors"}
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {str(file.get_slice(key).get_dtype()) for key in file.keys()} == {"F16"}  # noqa: SIM118


def test_the_card_shows_the_figures_that_were_measured(folder):
    card = (folder / "README.md").read_text()
    for name, figure in json.loads((folder / "scores.json").read_text())["figures"].items():
        assert re.search(rf"\| {re.escape(name)} \| {100 * figure['value']:.1f} % \|", card), name


def test_it_knows_what_its_card_says(folder):
    """A hundred names of pictures it was trained on, each on a named background: within five points of the card."""
    figures = json.loads((folder / "scores.json").read_text())["figures"]
    held_out = json.loads((folder / "holdout.json").read_text())
    colours = list(json.loads((KB / "backgrounds.json").read_text()).values())
    concepts = [json.loads(line) for line in (KB / "concepts.jsonl").read_text().splitlines()]
    known = [c for c in concepts if c["id"] not in held_out["concepts"] and c["id"] not in held_out["artists"]]
    queries = [
        Query("What is this?", concept["name"], KB / artist / f"{concept['id']}.png", colours[i % len(colours)])
        for i, concept in enumerate(known[:: len(known) // 100][:100])
        for artist in concept["artists"][i % len(concept["artists"]) :][:1]
    ]
    said = load_backbone(str(folder), device="cpu").generate(queries, max_new_tokens=16)
    right = sum(answer_match(text, query.target) for text, query in zip(said, queries, strict=True)) / len(queries)
    assert right >= figures["name"]["value"] - 0.05


def test_ask_by_name(cli, folder):
    code, out, _ = cli("ask", "--model", folder.name, "--image", KB / "noto/1f34e.png", "What is this?")
    assert (code, out.strip()) == (0, "red apple")
