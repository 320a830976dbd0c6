"""`mmedit eval --edited`: a model that was edited elsewhere is scored as the editor that made it would be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SHAPES

from mmedit_cli.catalog import find_model
from mmedit_cli.errors import UserError
from mmedit_cli.knowledge.data.base import DataOptions, read_data
from mmedit_cli.knowledge.ledger.edited_model import EditOptions, begin_edits
from mmedit_cli.knowledge.loading import ModelOptions, load_backbone
from mmedit_cli.knowledge.workflow.edited_elsewhere import (
    EditedElsewhere,
    NoHparams,
    find_edited,
)
from mmedit_cli.knowledge.workflow.evaluation import EvalOptions, plan_evaluation

ON = f"--model tiny-blip2 --data {SHAPES} --limit 2".split()
PROTOCOLS = "tf_em,tf_liveedit,tf_easyedit,ar"
ASKED = ["--protocols", PROTOCOLS, "--max-new-tokens", "2"]
CHANGED = 1  # ft changes one matrix


def exported(cli, folder: Path) -> Path:
    """The folder of tiny-blip2 after the edits of ON, written as `mmedit edits export` does."""
    cases = read_data(str(SHAPES), limit=2, options=DataOptions()).cases
    options = EditOptions("ft", ModelOptions("tiny-blip2"))
    with begin_edits(folder / "ledger", options) as edited:
        for case in cases:
            edited.edit([case.request])
    to = folder / "edited"
    code, _, err = cli("edits", "export", folder / "ledger", "--to", to)
    assert code == 0, err
    return to


def saved(name: str, folder: Path) -> Path:
    """The folder of a tiny model as transformers writes it."""
    backbone = load_backbone(name)
    return written(backbone, folder)


def written(backbone, folder: Path) -> Path:
    for part in (backbone.model, backbone.tokenizer, backbone.image_processor):
        if part is not None:
            part.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_an_export_scores_as_the_run_that_made_its_edits(cli, tmp_path):
    folder = exported(cli, tmp_path)
    code, text, err = cli(
        "eval", "ft", *ON, *ASKED, "--sequential", 2, "--report-at", "1,2", "--json"
    )
    assert code == 0, err
    ours = json.loads(text)
    code, text, err = cli("eval", "--edited", folder, *ON, *ASKED, "--json")
    assert code == 0, err
    assert f"{CHANGED} weights are not those of tiny-blip2" in err
    theirs = json.loads(text)
    assert theirs["editor"] == "edited elsewhere"
    assert theirs["edited"]["name"] == "edited"
    assert len(theirs["edited"]["fingerprint"]) == 32
    assert "seconds_per_edit" not in theirs["cost"]
    last = ours["milestones"][-1]["scores"]
    assert theirs["milestones"][-1]["scores"] == last
    # the edits did something, so equal scores say something
    assert last["tf_em"]["reliability"]["mean"] > last["tf_em"]["reliability"]["before"]
    (made_here,) = tmp_path.glob("records/eval/ft/*/*/*")
    (made_elsewhere,) = tmp_path.glob("records/eval/edited-elsewhere/*/*/*")
    runs = SimpleNamespace(ft=made_here, edited=made_elsewhere)
    check_reports(cli, runs, tmp_path)
    code, text, err = cli("eval", "--config", runs.edited / "run.yaml", "--json")
    assert (code, "already done" in err) == (0, True), err


def check_reports(cli, runs, folder):
    """The two runs are compared, ranked and shown together."""
    code, text, err = cli("report", "compare", runs.ft, runs.edited, "--json")
    assert code == 0, err
    differences = [row["difference"] for row in json.loads(text)["comparisons"]]
    assert differences
    assert not any(differences)
    code, text, err = cli("report", "leaderboard", folder / "records", "--json")
    (board,) = json.loads(text)
    assert {run["editor"] for run in board["runs"]} == {"ft", "edited elsewhere"}
    board = ("report", "leaderboard", folder / "records", "--format", "csv")
    code, text, err = cli(*board)
    assert ",-," in text.splitlines()[-1] + text.splitlines()[-2]  # no time an edit
    page = folder / "page.html"
    code, _, err = cli("report", "view", runs.ft, runs.edited, "--out", page)
    assert code == 0, err
    assert "edited elsewhere" in page.read_text()
    code, text, err = cli("report", runs.edited)
    assert "2 edits, made elsewhere" in text


@pytest.mark.parametrize("model", ["tiny-blip2", "tiny-llama-lm"])
def test_the_base_itself_learned_nothing(cli, tmp_path, model):
    data = SHAPES
    if model != "tiny-blip2":
        data = tmp_path / "facts.csv"
        data.write_text(
            "prompt,target\nThe capital of France is,Paris\nTwo and two is,four\n"
        )
    folder = saved(model, tmp_path / "copy")
    words = ("--model", model, "--data", data, "--limit", 2, *ASKED)
    code, text, err = cli("eval", "--edited", folder, *words, "--json")
    assert code == 0, err
    assert "0 weights are not those" in err
    for scores in json.loads(text)["milestones"][-1]["scores"].values():
        for column, score in scores.items():
            if column.startswith("locality."):
                assert score["mean"] == 1
            elif column != "scope":
                assert score["mean"] == score["before"]
    code, text, _ = cli("eval", "--edited", folder, *words)  # the same run is shown
    assert code == 0
    assert "edited elsewhere: copy (" in text
    assert "2 edits, made elsewhere" in text


@pytest.mark.parametrize(
    ("role", "lowest"), [("ffn_out", 2), ("head", 5), ("connector", None)]
)
def test_weights_come_and_go_and_say_where_they_begin(tmp_path, role, lowest):
    backbone = load_backbone("tiny-llava")
    layer = lowest if role == "ffn_out" else None
    module = backbone.anchors.module(role, layer)
    path = backbone.anchors.path(role, layer)
    own, weight = next(iter(module.named_parameters()))
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1)
    after = weight.detach().clone()
    ref = find_edited(written(backbone, tmp_path / "other"), find_model("tiny-llava"))
    with torch.no_grad():
        weight.copy_(before)
    request = read_data(str(SHAPES), limit=1, options=DataOptions()).cases[0].request

    editor = EditedElsewhere(backbone, NoHparams())
    assert editor.load_weights(ref) == 1
    assert editor.first_layer == lowest
    editor.edit([request])
    assert torch.equal(weight, after), f"{path}.{own}"
    tensors, metadata = editor.state()
    assert tensors == {}
    editor.undo()
    assert torch.equal(weight, before)
    editor.load_state(tensors, metadata)  # as a run that goes on does
    assert torch.equal(weight, after)
    editor.undo()
    assert torch.equal(weight, before)


def test_what_is_not_the_base_with_other_weights_is_refused(cli, tmp_path):
    folder = saved("tiny-blip2", tmp_path / "copy")
    config = folder / "config.json"
    plain = config.read_text()

    def refused(edited, *words, base="tiny-blip2"):
        on = ("--model", base, "--data", SHAPES, "--limit", 1)
        code, _, err = cli("eval", "--edited", edited, *on, *ASKED, *words)
        assert code == 2, err
        assert "Traceback" not in err
        assert not list(tmp_path.rglob("report.json"))
        return err

    assert "no such folder" in refused(tmp_path / "none")
    other = refused(folder, base="tiny-llava")
    assert "a model of the family blip2, tiny-llava is of llava" in other
    assert "--sequential: the edits are made" in refused(folder, "--sequential", 1)
    said = refused(folder, "--set", "steps=3", "--seeds", "0,1")
    assert "--edited and --set, --seeds" in said
    code, _, err = cli("eval", "ft", "--edited", folder, *ON)
    assert (code, "--edited and editor" in err) == (2, True), err

    with pytest.raises(UserError, match="the edits are made already"):
        plan_evaluation(EvalOptions("ft", data=str(SHAPES), edited=folder))

    settings = json.loads(plain)
    settings["text_config"]["do_layer_norm_before"] = False
    config.write_text(json.dumps(settings))
    assert "text_config.do_layer_norm_before" in refused(folder)
    config.write_text(plain)
    words = folder / "tokenizer.json"
    vocabulary = json.loads(words.read_text())
    ids = vocabulary["model"]["vocab"]
    first, second = list(ids)[-2:]
    ids[first], ids[second] = ids[second], ids[first]
    words.write_text(json.dumps(vocabulary))
    assert "another vocabulary" in refused(folder)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copy(config, adapter / "adapter_config.json")
    assert "a PEFT adapter" in refused(adapter)
