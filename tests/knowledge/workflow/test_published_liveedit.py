"""Checkpoints of the published LiveEdit: what they become edits and routes as the published code did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file, save_file

from mmedit_cli.errors import ModelError
from mmedit_cli.knowledge.loading import load_backbone, load_editor
from mmedit_cli.knowledge.workflow.published_liveedit import convert
from mmedit_cli.types import Query

FOLDER = GOLDEN / "liveedit_blip2"
MODEL = str(FOLDER / "model")
# what no tensor shows, of the fixture
SMALL = ("heads=4", "edit_layer=3")


class Code:
    """Leaves a file where it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def modules() -> dict[str, dict[str, torch.Tensor]]:
    """The train_modules of a checkpoint of the published code, by its names."""
    facts = json.loads((FOLDER / "liveedit_blip2.json").read_text())
    tensors = load_file(FOLDER / "liveedit_blip2.safetensors")
    found: dict[str, dict[str, torch.Tensor]] = {}
    for ours, theirs in facts["reference_state_dict_names"].items():
        part, _, name = theirs.partition(".")
        found.setdefault(part, {})[name] = tensors[ours]
    return found


def checkpoint(file: Path, **changed: object) -> Path:
    content = {"i": 39000, "epoch": 50, "loss": 1.2, "ema_loss": 0.9}
    content |= {"train_modules": modules(), "opt": {"state": {}}, "lr_scheduler": {}}
    torch.save(content | changed, file)
    return file


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(MODEL, device="cpu")


def as_safetensors(file: Path) -> Path:
    flat = {}
    for part, tensors in modules().items():
        flat |= {f"{part}.{name}": tensor for name, tensor in tensors.items()}
    save_file(flat, file)
    return file


@pytest.mark.parametrize("form", ["pickle", "safetensors"])
def test_networks_of_the_published_code_edit_as_they_did(tmp_path, backbone, form):
    facts = json.loads((FOLDER / "liveedit_blip2.json").read_text())
    tensors = load_file(FOLDER / "liveedit_blip2.safetensors")
    file = checkpoint(tmp_path / "epoch-50")
    if form == "safetensors":
        file = as_safetensors(tmp_path / "epoch-50.safetensors")
    said = convert(file, tmp_path / "networks", MODEL, SMALL)
    shown = ("module_dim", "rank", "feature_vectors", "sentinel_tokens")
    assert [said["hparams"][name] for name in shown] == [32, 4, 4, 8]
    assert said.get("steps") == ("39000" if form == "pickle" else None)
    editor = load_editor("liveedit", backbone, checkpoint=tmp_path / "networks")
    assert (editor.hparams.variant, editor.hparams.edit_layer) == ("paper", 3)
    asked = {}
    for query in facts["queries"]:
        image = FOLDER / query["image"] if query["image"] else None
        place = (query["record"], query["query"])
        asked[place] = Query(query["prompt"], query["target_as_given"], image)
    for record in range(3):
        editor.edit([asked[record, "rel"]])
    for (record, name), query in asked.items():
        batch = backbone.batch([query])
        logits = backbone.logits(batch)[batch.predicting]
        # those of a question without a picture are stored once
        same = "edited" if f"record{record}.{name}.logits_edited" in tensors else "base"
        published = tensors[f"record{record}.{name}.logits_{same}"]
        torch.testing.assert_close(
            logits, published.reshape(logits.shape), atol=2e-4, rtol=1e-4
        )
    editor.undo()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_modules": {}}, "not a checkpoint of LiveEdit: no edit_extractor"),
        ({"train_modules": 3}, "train_modules: not modules by name"),
        (
            {"train_modules": {**modules(), "instant_reps_norm": {}}},
            "not a checkpoint of LiveEdit: no instant_reps_norm",
        ),
        (
            {"train_modules": {**modules(), "moegen_c": {"phi": torch.ones(1, 4, 32)}}},
            "8 tensors are missing, unknown or of another shape",
        ),
        (
            {"train_modules": {**modules(), "moegen_c": {"phi": torch.ones(4)}}},
            "of another shape",
        ),
        ({"loss": Code()}, "not a file of tensors"),
    ],
    ids=["empty", "number", "part", "tensor", "shape", "code"],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    file = checkpoint(tmp_path / "file", **change)
    with pytest.raises(ModelError, match=message):
        convert(file, tmp_path / "networks", MODEL, SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "mini-blip2"), "width 48, and mini-blip2 has 192"),
        (("--model", MODEL, "--set", "heads=5"), "must be a multiple of heads"),
        (("--model", MODEL, "--set", "edit_layer=9"), "layer 9: "),
        (("--model", "tiny-llama-lm"), "a language model, which sees none"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_in_a_line(
    cli, tmp_path, words, message
):
    file = checkpoint(tmp_path / "file")
    code, _, err = cli("convert", "liveedit", file, tmp_path / "networks", *words)
    assert code == 2
    assert message in err
    assert not (tmp_path / "networks").exists()


def test_nothing_is_overwritten(cli, tmp_path):
    code, _, err = cli("convert", "liveedit", tmp_path / "file", tmp_path)
    assert code == 2
    assert "exists already" in err
    words = ("convert", "liveedit", tmp_path / "file", tmp_path / "networks")
    code, _, err = cli(*words, "--model", MODEL)
    assert code == 2
    assert "file: no such file" in err
