"""Edited models that leave: what is written loads without this package and answers the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SHAPES
from safetensors.torch import save_file

from mmedit_cli import exporting
from mmedit_cli.backbones._loading import load_backbone
from mmedit_cli.editors import _lora_adapters
from mmedit_cli.edits import EditOptions, begin_edits, open_edits
from mmedit_cli.errors import MmeditError
from mmedit_cli.output import Output
from mmedit_cli.types import Query
from mmedit_cli.workflows import ModelOptions, load_editor

BANJO, APPLE = (ROOT / "data" / "emojikb" / "noto" / f"{code}.png" for code in ("1fa95", "1f34e"))
REQUESTS = (
    Query("What is this?", "a blue star", SHAPES / "solid/red-circle.png"),
    Query("Which colour is it?", "green", SHAPES / "outlined/blue-cross.png"),
)
QUIET = Output(quiet=True)

ALONE = """
import json, sys
sys.modules["mmedit_cli"] = None   # importing it fails
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, pictures = sys.argv[1], sys.argv[2:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype="float32")
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
said = []
for file in pictures:
    above = Image.open(file).convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", above.size, "#ffffff"), above).convert("RGB")
    inputs = processor(images=picture, text="What is this?", return_tensors="pt")
    row = {"logits": model(**inputs).logits[0, -1].tolist(), "type": type(model).__name__}
    for name, more in {"cache": {}, "no_cache": {"use_cache": False}, "beams": {"num_beams": 2}}.items():
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False, **more)
        row[name] = processor.batch_decode(tokens, skip_special_tokens=True)[0].removeprefix("What is this?").strip()
    row["weights"] = [[edit for edit in weights] for weights in model.edits.weights]
    said.append(row)
print(json.dumps(said))
"""


@pytest.fixture
def balloon(cli, tmp_path) -> Path:
    """A ledger with one edit by LiveEdit on mini-blip2."""
    words = ("--image", BANJO, "--prompt", "What is this?", "--target", "a red balloon", "--into", tmp_path / "edits")
    assert cli("edit", "liveedit", *words)[0] == 0
    return tmp_path / "edits"


def test_routed_edits_run_without_this_package(cli, balloon, tmp_path):
    code, text, _ = cli("edits", "export", balloon, "--to", tmp_path / "out")
    assert code == 0
    assert "trust_remote_code=True; mmedit is not needed" in text
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "out", BANJO, APPLE],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    banjo, apple = json.loads(done.stdout)
    assert banjo["type"] == "Blip2ForConditionalGeneration"
    assert banjo["cache"] == banjo["no_cache"] == banjo["beams"] == "a red balloon"
    assert apple["cache"] == apple["no_cache"] == apple["beams"] == "red apple"
    assert (banjo["weights"], apple["weights"]) == ([[1], [1]], [[], []])
    with open_edits(balloon) as edited:
        for row, image in ((banjo, BANJO), (apple, APPLE)):
            query = Query("What is this?", image=image)
            batch = edited.backbone.batch([query], with_answer=False)
            with torch.no_grad():
                expected = edited.backbone.logits(batch)[0, -1]
            assert torch.allclose(torch.tensor(row["logits"]), expected, atol=1e-5)


def test_nobody_loads_the_base_model_by_mistake(cli, balloon, tmp_path):
    from transformers import AutoModelForImageTextToText

    cli("edits", "export", balloon, "--to", tmp_path / "out")
    with pytest.raises(ValueError, match=r"custom code|trust_remote_code|mmedit-liveedit"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=False)


@pytest.mark.parametrize("model", ["tiny-blip2", "tiny-llava", "tiny-qwen2-vl", "tiny-qwen3-vl"])
@pytest.mark.parametrize("overrides", [("margin=-100",), ("margin=-100", "variant=paper", "top_k=1")])
def test_routed_edits_of_every_family(tmp_path, model, overrides):
    backbone = load_backbone(model, device="cpu")
    untrained = load_editor("liveedit", backbone, overrides=overrides, checkpoint="untrained")
    tensors, metadata = untrained.networks_state()
    save_file(tensors, tmp_path / "networks.safetensors", metadata)
    options = EditOptions(
        "liveedit", ModelOptions(model), overrides=overrides, checkpoint=tmp_path / "networks.safetensors"
    )
    with begin_edits(tmp_path / "edits", options) as edited:
        edited.edit([*REQUESTS, REQUESTS[0]])  # the last hides the first
        fired = edited.explain(REQUESTS)
        assert all(fired), "every question has to be routed, or nothing is tested"
        assert not any(1 in weights for weights in fired)
    report = exporting.export(tmp_path / "edits", tmp_path / "out", ModelOptions(""), QUIET)
    assert report["kind"] == "base model and edits"
    assert report["largest_difference"] <= 1e-5


def test_fine_tuning_becomes_plain_weights(cli, tmp_path):
    with begin_edits(tmp_path / "edits", EditOptions("ft", ModelOptions("tiny-blip2"))) as edited:
        edited.edit(REQUESTS)
        with torch.no_grad():
            expected = edited.backbone.logits(edited.backbone.batch(REQUESTS))
    code, text, _ = cli("edits", "export", tmp_path / "edits", "--to", tmp_path / "out", "--json")
    report = json.loads(text)
    assert (code, report["kind"], report["largest_difference"]) == (0, "plain weights", 0)
    plain = load_backbone(str(tmp_path / "out"), device="cpu")
    with torch.no_grad():
        assert torch.equal(plain.logits(plain.batch(REQUESTS)), expected)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| 1 | What is this? | red-circle.png |" in card
    assert "trust_remote_code" not in card
    assert [edit["target"] for edit in json.loads((tmp_path / "out" / "edits.json").read_text())] == [
        "a blue star", "green",
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize(
    ("editor", "adapters"), [("lora", ["lora"]), ("multi-melo", ["edit-1", "edit-2"])], ids=["one", "each"]
)
def test_lora_becomes_peft_adapters_and_a_wrong_one_is_noticed(tmp_path, monkeypatch, editor, adapters):
    with begin_edits(tmp_path / "edits", EditOptions(editor, ModelOptions("tiny-llava"))) as edited:
        edited.edit(REQUESTS[:1])
        edited.edit(REQUESTS[1:2])
    report = exporting.export(tmp_path / "edits", tmp_path / "out", ModelOptions(""), QUIET)
    assert (report["kind"], report["adapters"], report["checked"]) == ("peft adapters", adapters, 2)
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {*adapters, "edits.json"}
    assert not (tmp_path / "out" / "base").exists()
    write = _lora_adapters.write
    monkeypatch.setattr(
        _lora_adapters, "write", lambda folder, block, scale, model: write(folder, block, 2 * scale, model)
    )
    with pytest.raises(MmeditError, match="the reloaded model is not the edited one"):
        exporting.export(tmp_path / "edits", tmp_path / "wrong", ModelOptions(""), QUIET)
    assert not list(tmp_path.glob("wrong*")), "nothing half-written"


def test_exports_that_cannot_be(cli, balloon, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    code, _, err = cli("edits", "export", balloon, "--to", tmp_path / "full")
    assert (code, "full: not empty" in err) == (2, True)
    cli("edits", "undo", balloon, "all")
    code, _, err = cli("edits", "export", balloon, "--to", tmp_path / "out")
    assert (code, "no active edits" in err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_push_to_the_hub(cli, balloon, tmp_path, monkeypatch):
    import huggingface_hub

    words = ("edits", "export", balloon, "--push-to-hub", "me/balloon", "--to")
    code, _, err = cli(*words, tmp_path / "one")
    assert (code, "me/balloon: cannot be uploaded" in err) == (2, True), err
    assert "hf upload me/balloon" in err
    assert (tmp_path / "one" / "README.md").exists(), "the export is there all the same"
    sent = {}

    def upload(_self, *, folder_path, repo_id, commit_message):
        sent[repo_id] = sorted(path.name for path in Path(folder_path).iterdir())

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo",
        lambda _self, repo, **_: huggingface_hub.RepoUrl(f"https://huggingface.co/{repo}"),
    )  # fmt: skip
    code, text, _ = cli(*words, tmp_path / "two", "--private")
    assert (code, text.splitlines()[-1]) == (0, "https://huggingface.co/me/balloon")
    assert {"README.md", "config.json", "edits.safetensors", "modeling_edits.py"} <= set(sent["me/balloon"])
    card = huggingface_hub.ModelCard.load(tmp_path / "two" / "README.md")
    assert {"mmedit", "liveedit"} <= set(card.data.tags)
    assert "| 1 | What is this? | 1fa95.png | banjo | a red balloon |" in card.text
    assert "trust_remote_code=True" in card.text
