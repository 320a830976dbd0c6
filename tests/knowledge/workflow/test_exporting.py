"""Edited models that leave: what is written loads without this package and answers the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SHAPES, fork, needs_fork
from safetensors.torch import save_file

from mmedit_cli.app import main
from mmedit_cli.errors import MmeditError, UserError
from mmedit_cli.knowledge.ledger.edited_model import (
    EditOptions,
    begin_edits,
    open_edits,
)
from mmedit_cli.knowledge.loading import ModelOptions, load_editor
from mmedit_cli.knowledge.methods.multi_melo.keys import BackboneKeys, HubKeys
from mmedit_cli.knowledge.methods.shared import flatten, lora_adapters, standalone
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.knowledge.workflow import exporting
from mmedit_cli.output import Output
from mmedit_cli.types import Query

BANJO, APPLE = (
    ROOT / "data" / "emojikb" / "noto" / f"{code}.png" for code in ("1fa95", "1f34e")
)
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

def drawn(file):
    above = Image.open(file).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", above.size, "#ffffff"), above).convert("RGB")

def answers(inputs, **more):
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False, **more)
    texts = processor.batch_decode(tokens, skip_special_tokens=True)
    return [text.rpartition("?")[2].strip() for text in texts]

said = []
for file in pictures:
    inputs = processor(images=drawn(file), text="What is this?", return_tensors="pt")
    row = {"logits": model(**inputs).logits[0, -1].tolist(), "type": type(model).__name__}
    for name, more in {"cache": {}, "no_cache": {"use_cache": False}, "beams": {"num_beams": 2}}.items():
        row[name] = answers(inputs, **more)[0]
    row["weights"] = [[edit for edit in weights] for weights in model.edits.weights]
    said.append(row)
processor.tokenizer.padding_side = "left"
questions = ["What is this?", "What is this?", "What can you see here?"]
shown = [drawn(file) for file in [*pictures, pictures[0]]]
inputs = processor(images=shown, text=questions, padding=True, return_tensors="pt")
said.append({"batch": answers(inputs), "weights": [[edit for edit in weights] for weights in model.edits.weights]})
print(json.dumps(said))
"""


ONLY_LOADED = """
import sys
sys.modules["mmedit_cli"] = None
from transformers import AutoModelForImageTextToText
print(AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True).edits.ids)
"""


def run_copied(code, folder, *words) -> SimpleNamespace:
    """Run a program without this package in a copy of this process, which has imported transformers already."""
    files = [folder / name for name in ("stdout.txt", "stderr.txt")]

    def run() -> None:
        for number, path in enumerate(files, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        for name in [name for name in sys.modules if name.startswith("mmedit_cli")]:
            del sys.modules[name]
        sys.argv = ["-c", *map(str, words)]
        os.chdir(folder)
        exec(compile(code, "alone.py", "exec"), {"__name__": "__main__"})

    _, status = os.waitpid(fork(run), 0)
    out, err = (path.read_text() for path in files)
    code = os.waitstatus_to_exitcode(status)
    return SimpleNamespace(returncode=code, stdout=out, stderr=err)


def run_alone(code, folder, *words):
    """Run a program in a folder from which this package cannot be imported."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "HF_HOME": str(folder / "hf")
    }
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


WORDS = ("--image", BANJO, "--prompt", "What is this?", "--target", "a red balloon")


@pytest.fixture(scope="module")
def whole_balloon(tmp_path_factory) -> Path:
    """A ledger with one edit by LiveEdit on mini-blip2; it is copied, not changed."""
    folder = tmp_path_factory.mktemp("whole") / "edits"
    words = ("edit", "liveedit", *WORDS, "--into", folder)
    assert main(list(map(str, words))) == 0
    return folder


@pytest.fixture
def balloon(whole_balloon, tmp_path) -> Path:
    """A ledger with one edit by LiveEdit on mini-blip2."""
    return shutil.copytree(whole_balloon, tmp_path / "edits")


@pytest.mark.parametrize(
    ("editor", "run"),
    [
        pytest.param("liveedit", run_copied, marks=needs_fork, id="liveedit"),
        *(
            pytest.param(name, run_alone, marks=pytest.mark.slow, id=f"{name}-alone")
            for name in ("liveedit", "grace", "multi-melo", "unike")
        ),
    ],
)
def test_routed_edits_run_without_this_package(cli, editor, run, tmp_path):
    balloon = tmp_path / "edits"
    assert cli("edit", editor, *WORDS, "--into", balloon)[0] == 0
    code, text, err = cli(
        "ask", "--edits", balloon, "--compare", "--image", BANJO, "What is this?"
    )
    assert (code, "edits that took part: 1 (" in text) == (0, True), err
    code, text, _ = cli("edits", "export", balloon, "--to", tmp_path / "out")
    assert code == 0
    assert "trust_remote_code=True; mmedit is not needed" in text
    done = run(ALONE, tmp_path, tmp_path / "out", BANJO, APPLE)
    assert done.returncode == 0, done.stderr[-2000:]
    banjo, apple, batch = json.loads(done.stdout)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["model_type"]
        == f"mmedit-{editor}"
    )
    assert batch == {
        "batch": ["a red balloon", "red apple", "a red balloon"],
        "weights": [[1], [], [1]],
    }
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
    with pytest.raises(
        ValueError, match=r"custom code|trust_remote_code|mmedit-liveedit"
    ):
        AutoModelForImageTextToText.from_pretrained(
            tmp_path / "out", trust_remote_code=False
        )


EDITORS = ("grace", "liveedit")  # a codebook, and experts
METHODS = {
    "grace": ("grace", "steps=5"),
    "wise": ("wise", "steps=30", "act_ratio=0.01"),
    "liveedit": ("liveedit", "margin=-100"),
    "liveedit-paper": ("liveedit", "margin=-100", "variant=paper", "top_k=1"),
    "multi-melo": ("multi-melo", "steps=5"),
    "unike": ("unike", "threshold=-1000", "steps=5"),
    "unike-reference": ("unike", "mode=reference", "steps=2"),
}


@pytest.mark.parametrize(
    "model",
    ["tiny-blip2", "tiny-llava", "tiny-minigpt4", "tiny-qwen2-vl", "tiny-qwen3-vl"],
)
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=[] if name in EDITORS else pytest.mark.slow)
        for name in METHODS
    ],
)
def test_routed_edits_of_every_family(tmp_path, model, method):
    edits = begun(tmp_path, model, *METHODS[method])
    routed = [
        *REQUESTS,
        replace(REQUESTS[0], target="yellow"),
    ]  # the last hides the first
    if "liveedit" not in method:
        routed.insert(0, Query("What is the capital of Peru?", "Lima"))
    with edits as edited:
        edited.edit(routed)
        fired = edited.explain(routed)
    if method != "unike-reference":
        assert all(fired), "every question has to be routed, or nothing is tested"
    if method not in ("unike-reference", "wise"):  # a memory has several edits
        assert not any(len(routed) - 2 in weights for weights in fired)
    report = exporting.export(
        tmp_path / "edits", tmp_path / "out", ModelOptions(""), QUIET
    )
    assert report["kind"] == "base model and edits"
    assert report["largest_difference"] <= 1e-5
    assert (report["checked"], report["continued"]) == (len(routed) + 1, 2)


NAMED = ("margin=-100", "naming=What can be seen?")


@pytest.mark.parametrize(
    "model",
    [
        "tiny-blip2",
        pytest.param("tiny-llava", marks=pytest.mark.slow),
        pytest.param("tiny-minigpt4", marks=pytest.mark.slow),
    ],
)
def test_edits_found_by_names_ask_for_them_without_this_package(tmp_path, model):
    with begun(tmp_path, model, "liveedit", *NAMED) as edited:
        edited.edit(REQUESTS)
        names = edited.editor.tensors()["names"]
    assert (names[:, 0, 0] >= 0).all(), "the pictures have names, or nothing is tested"
    report = exporting.export(
        tmp_path / "edits", tmp_path / "out", ModelOptions(""), QUIET
    )
    assert report["largest_difference"] <= 1e-5


def test_edits_found_by_names_need_positions_that_an_export_can_count(tmp_path):
    with begun(tmp_path, "tiny-qwen2-vl", "liveedit", *NAMED) as edited:
        edited.edit(REQUESTS[:1])
    with pytest.raises(UserError, match="ask for the names of pictures"):
        exporting.export(tmp_path / "edits", tmp_path / "out", ModelOptions(""), QUIET)
    assert not (tmp_path / "out").exists()


def begun(folder, model, editor, *overrides):
    """Return a new ledger of a tiny model in a folder; a method that trains has networks without any training."""
    networks = None
    untrained = load_editor(
        editor,
        load_backbone(model, device="cpu"),
        overrides=overrides,
        checkpoint="untrained",
    )
    if untrained.trains:
        if editor == "unike":
            layers, _, width = untrained.networks.pos.shape
            untrained.networks.know(
                torch.randn(8, width), torch.randn(layers, 8, width)
            )
        tensors, metadata = untrained.networks_state()
        networks = folder / "networks.safetensors"
        save_file(tensors, networks, metadata)
    options = EditOptions(
        editor, ModelOptions(model), overrides=overrides, checkpoint=networks
    )
    return begin_edits(folder / "edits", options)


@pytest.mark.slow  # a process of its own
def test_a_model_that_transformers_does_not_know_takes_its_code_along(tmp_path):
    with begun(tmp_path, "tiny-minigpt4", "multi-melo", "steps=2") as edited:
        edited.edit(REQUESTS)
    exporting.export(tmp_path / "edits", tmp_path / "out", ModelOptions(""), QUIET)
    done = run_alone(ONLY_LOADED, tmp_path, tmp_path / "out")
    assert done.stdout.strip() == "[1, 2]", done.stderr[-2000:]


def test_an_export_that_routes_every_token_anew_is_noticed(tmp_path, monkeypatch):
    with begun(tmp_path, "tiny-llava", "multi-melo") as edited:
        edited.edit(REQUESTS)
    once = "self._generating and self._begun"
    real = standalone.flatten
    runtime = Path(standalone.__file__).parents[1] / "multi_melo" / "runtime.py"
    assert once in real(runtime)
    monkeypatch.setattr(
        standalone, "flatten", lambda file: real(file).replace(once, "False")
    )
    with pytest.raises(MmeditError, match="does not continue a batch"):
        exporting.export(tmp_path / "edits", tmp_path / "out", ModelOptions(""), QUIET)


def test_a_flattened_file_has_what_it_needs_once(tmp_path):
    file = tmp_path / "both.py"
    file.write_text(
        "from mmedit_cli.knowledge.methods.liveedit.experts import choose\n\nprint(choose)\n"
    )
    found = flatten.flatten(file)
    assert found.startswith("import torch\n")
    assert [
        name
        for name in ("Routing", "soft_weights", "ExpertBank", "safetensors")
        if name in found
    ] == [
        "Routing",
        "soft_weights",
    ]
    compile(found, "both.py", "exec")
    file.write_text(
        "from mmedit_cli.knowledge.methods.liveedit.experts import _grown\n"
        "from mmedit_cli.knowledge.methods.shared.lora_blocks import BlockBank\n"
    )
    with pytest.raises(
        ValueError,
        match=r"methods\.shared\.lora_blocks and "
        r"mmedit_cli\.knowledge\.methods\.liveedit\.experts define _grown",
    ):
        flatten.flatten(file)


@pytest.mark.parametrize("router", ["hub", "melo"])
def test_a_router_beside_the_model_is_not_exported(cli, tmp_path, router, monkeypatch):
    with begun(
        tmp_path, "tiny-blip2", "multi-melo", f"router={router}", "steps=2"
    ) as edited:
        if router == "hub":
            monkeypatch.setattr(HubKeys, "keys", BackboneKeys(edited.backbone, 3).keys)
        edited.edit(REQUESTS)
    code, _, err = cli("edits", "export", tmp_path / "edits", "--to", tmp_path / "out")
    assert (
        code,
        f"multi-melo with router={router} cannot be exported as a whole" in err,
    ) == (2, True), err
    assert "--adapters exports its blocks" in err


def test_fine_tuning_becomes_plain_weights(cli, tmp_path):
    with begin_edits(
        tmp_path / "edits", EditOptions("ft", ModelOptions("tiny-blip2"))
    ) as edited:
        edited.edit(REQUESTS)
        with torch.no_grad():
            expected = edited.backbone.logits(edited.backbone.batch(REQUESTS))
    code, text, _ = cli(
        "edits", "export", tmp_path / "edits", "--to", tmp_path / "out", "--json"
    )
    report = json.loads(text)
    assert (code, report["kind"], report["largest_difference"]) == (
        0,
        "plain weights",
        0,
    )
    plain = load_backbone(str(tmp_path / "out"), device="cpu")
    with torch.no_grad():
        assert torch.equal(plain.logits(plain.batch(REQUESTS)), expected)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| 1 | What is this? | red-circle.png |" in card
    assert "trust_remote_code" not in card
    assert [
        edit["target"]
        for edit in json.loads((tmp_path / "out" / "edits.json").read_text())
    ] == [
        "a blue star",
        "green",
    ]


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft asks for it
@pytest.mark.parametrize(
    ("editor", "adapters"),
    [("lora", ["lora"]), ("multi-melo", ["edit-1", "edit-2"])],
    ids=["one", "each"],
)
def test_lora_becomes_peft_adapters_and_a_wrong_one_is_noticed(
    tmp_path, monkeypatch, editor, adapters
):
    with begin_edits(
        tmp_path / "edits", EditOptions(editor, ModelOptions("tiny-llava"))
    ) as edited:
        edited.edit(REQUESTS[:1])
        edited.edit(REQUESTS[1:2])
    report = exporting.export(
        tmp_path / "edits", tmp_path / "out", ModelOptions(""), QUIET, adapters=True
    )
    assert (report["kind"], report["adapters"], report["checked"]) == (
        "peft adapters",
        adapters,
        2,
    )
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        *adapters,
        "edits.json",
    }
    assert not (tmp_path / "out" / "base").exists()
    write = lora_adapters.write
    monkeypatch.setattr(
        lora_adapters,
        "write",
        lambda folder, block, scale, backbone: write(
            folder, block, 2 * scale, backbone
        ),
    )
    with pytest.raises(MmeditError, match="the reloaded model is not the edited one"):
        exporting.export(
            tmp_path / "edits",
            tmp_path / "wrong",
            ModelOptions(""),
            QUIET,
            adapters=True,
        )
    assert not list(tmp_path.glob("wrong*")), "nothing half-written"


def test_exports_that_cannot_be(cli, balloon, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    code, _, err = cli("edits", "export", balloon, "--to", tmp_path / "full")
    assert (code, "full: not empty" in err) == (2, True)
    code, _, err = cli(
        "edits", "export", balloon, "--to", tmp_path / "out", "--adapters"
    )
    assert (code, "liveedit has no adapters" in err) == (2, True)
    cli("edits", "undo", balloon, "all")
    code, _, err = cli("edits", "export", balloon, "--to", tmp_path / "out")
    assert (code, "no active edits" in err) == (2, True)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def hub_user(monkeypatch):
    """The hub as a user sees it; return what was sent to it."""
    import huggingface_hub

    sent = {}

    def upload(_self, *, folder_path, repo_id, commit_message, ignore_patterns):
        if "fails" in sent:
            del sent["fails"]
            raise ConnectionResetError("the network went away")
        names = {path.name for path in Path(folder_path).iterdir()}
        sent[repo_id] = sorted(names - set(ignore_patterns))

    user = {
        "name": "me",
        "orgs": [{"name": "us"}],
        "auth": {"accessToken": {"role": "write"}},
    }
    monkeypatch.delenv("HF_HUB_OFFLINE")
    api = huggingface_hub.HfApi
    monkeypatch.setattr(api, "whoami", lambda _self: user)
    monkeypatch.setattr(api, "upload_folder", upload)
    address = "https://huggingface.co"
    monkeypatch.setattr(
        api,
        "create_repo",
        lambda _self, repo, **_: huggingface_hub.RepoUrl(f"{address}/{repo}"),
    )
    return sent


@pytest.mark.parametrize("repo", ["me/balloon", "nonsense//name"])
def test_the_hub_is_asked_before_anything_is_written(
    cli, balloon, tmp_path, monkeypatch, repo
):
    code, _, err = cli(
        "edits", "export", balloon, "--push-to-hub", repo, "--to", tmp_path / "one"
    )
    assert (code, "HF_HUB_OFFLINE is set" in err) == (2, True), err
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize(
    ("repo", "role", "expected"),
    [
        ("you/balloon", "write", "me does not belong to you"),
        ("me/balloon", "read", "the token may only read"),
        ("no name/at/all", "write", "is no name of a repository"),
    ],
)
def test_an_upload_that_would_be_refused_is_refused_first(
    cli, balloon, tmp_path, monkeypatch, hub_user, repo, role, expected
):
    import huggingface_hub

    user = {"name": "me", "orgs": [], "auth": {"accessToken": {"role": role}}}
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda _self: user)
    code, _, err = cli(
        "edits", "export", balloon, "--push-to-hub", repo, "--to", tmp_path / "one"
    )
    assert (code, expected in err) == (2, True), err
    assert not (tmp_path / "one").exists()


def test_push_to_the_hub(cli, balloon, tmp_path, hub_user):
    import huggingface_hub

    words = (
        "edits",
        "export",
        balloon,
        "--push-to-hub",
        "me/balloon",
        "--private",
        "--to",
        tmp_path / "two",
    )
    hub_user["fails"] = True
    code, _, err = cli(*words)
    assert (code, "me/balloon: cannot be uploaded" in err) == (2, True), err
    assert "the same command uploads it" in err
    files = {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / "two").iterdir()
    }
    code, text, err = cli(*words)
    assert (code, text.splitlines()[-1]) == (0, "https://huggingface.co/me/balloon"), (
        err
    )
    left = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "two").iterdir()}
    assert left == {
        name: time for name, time in files.items() if name != "not-uploaded.json"
    }, "nothing is made again"
    assert hub_user["me/balloon"] == sorted(left)
    assert {
        "README.md",
        "config.json",
        "edits.safetensors",
        "modeling_edits.py",
    } <= set(left)
    code, _, err = cli(*words)
    assert (code, "two: not empty" in err) == (2, True)
    card = huggingface_hub.ModelCard.load(tmp_path / "two" / "README.md")
    assert {"mmedit", "liveedit"} <= set(card.data.tags)
    assert "| 1 | What is this? | 1fa95.png | banjo | a red balloon |" in card.text
    assert "trust_remote_code=True" in card.text
