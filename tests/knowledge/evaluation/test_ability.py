"""What no edit is about: the perplexity of a text and facts about the world, before and after."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import ROOT

from mmedit_cli.knowledge.data.base import load_cases
from mmedit_cli.knowledge.evaluation.ability import (
    Ability,
    Probe,
    compared,
    measure_ability,
    perplexity,
)
from mmedit_cli.knowledge.loading import load_backbone, load_editor
from mmedit_cli.knowledge.methods.shared.side_effects import unrelated_questions
from mmedit_cli.types import Query

REAL = ROOT / "data" / "real"
FACT = Query("The colour of the moon is", "green")
TEXT = "The colour of the star is blue. What is a tree? " * 20


@pytest.fixture(scope="module")
def llama():
    return load_backbone("tiny-llama-lm", device="cpu")


def taught(model):
    """An editor that has changed the model much."""
    editor = load_editor("ft", model, overrides=["learning_rate=1e-1", "steps=5"])
    editor.edit([FACT])
    return editor


def test_perplexity_is_that_of_the_next_tokens(llama):
    probe = Probe(TEXT, (), tokens=16)
    ids = llama.tokenizer(TEXT)["input_ids"][:16]
    text = llama.tokenizer.decode(ids, skip_special_tokens=True)
    ids = llama.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = llama.model(input_ids=ids).logits[0, :-1].double()
    surprise = [
        -math.log(row.softmax(-1)[token])
        for row, token in zip(logits, ids[0, 1:], strict=True)
    ]
    expected = math.exp(sum(surprise) / len(surprise))
    assert perplexity(llama, probe) == pytest.approx(expected, rel=1e-4)
    assert math.isnan(perplexity(llama, Probe("", ())))


def test_windows_fit_a_model_that_reads_little(llama, monkeypatch):
    whole = perplexity(llama, Probe(TEXT, ()))
    monkeypatch.setattr(llama, "max_length", 24)
    in_parts = perplexity(llama, Probe(TEXT, ()))
    assert math.isfinite(in_parts)
    assert in_parts != whole


def test_an_untouched_model_is_as_before_and_an_edited_one_is_not(llama):
    question = Query("What is a star?")
    (said,) = llama.generate([question], max_new_tokens=6)
    known = Query(question.prompt, said)
    probe = Probe(TEXT, (known, Query("What is a tree?", "no such answer")))
    before = measure_ability(llama, probe)
    assert before.right == (True, False)
    again = compared(before, measure_ability(llama, probe))
    assert again["perplexity"]["before"] == again["perplexity"]["after"]
    assert again["world"] == {"n": 1, "kept": 1}
    editor = taught(llama)
    after = compared(before, measure_ability(llama, probe))
    assert after["perplexity"]["after"] != before.perplexity
    assert after["world"] == {"n": 1, "kept": 0}
    editor.undo()
    assert measure_ability(llama, probe) == before


def test_only_what_was_known_can_be_kept():
    before = Ability(2.0, (True, True, False))
    after = Ability(3.0, (True, False, True))
    found = compared(before, after)
    assert found["world"] == {"n": 2, "kept": 1}
    assert found["perplexity"] == {"before": 2.0, "after": 3.0}


def test_what_evaluates_is_neither_tuned_on_nor_taught_nor_protected():
    evaluates, tunes = Probe.shipped(), Probe.shipped(tuning=True)
    assert len(evaluates.facts) == 200
    assert not set(evaluates.facts) & set(tunes.facts)
    text = (REAL / "alice.txt").read_text()
    assert evaluates.text + tunes.text == text
    lines = [
        json.loads(line)
        for name in ("facts.jsonl", "tuning.jsonl")
        for line in (REAL / name).read_text().splitlines()
    ]
    taught = {case["request"]["prompt"] for case in lines}
    assert not taught & {fact.prompt for fact in (*evaluates.facts, *tunes.facts)}
    protected = unrelated_questions(2000, pictures=False)
    capitals = {q.target for q in protected if "capital" in q.prompt}
    assert capitals
    assert not capitals & {fact.target for fact in evaluates.facts}
    assert load_cases(REAL / "world.jsonl")[0].request == evaluates.facts[0]


@pytest.mark.parametrize("rate", ["1e-1", "1e-30"])
def test_a_report_says_what_became_of_it(cli, tmp_path, rate):
    """Of the first group of edits; a rate of nearly nothing leaves the weights as they are."""
    facts = tmp_path / "facts.jsonl"
    rows = [
        {"prompt": "The colour of the moon is", "target": "green"},
        {"prompt": "What is a star?", "target": "a blue house"},
    ]
    facts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (
        *("eval", "ft", "--model", "tiny-llama-lm", "--data", facts, "--ability"),
        *("--set", f"learning_rate={rate}", "--set", "steps=3"),
    )
    code, out, err = cli(*words, "--json")
    assert code == 0, err
    ability = json.loads(out)["ability"]
    was, now = ability["perplexity"]["before"], ability["perplexity"]["after"]
    assert (was == now) == (rate == "1e-30")
    code, out, _ = cli(*words)
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.startswith("ability: ")]
    assert f"perplexity {was:.2f} before, {now:.2f} after" in line
    assert "facts about the world kept" in line
    plain = [word for word in words if word != "--ability"]
    code, out, _ = cli(*plain, "--json")
    assert code == 0
    assert "ability" not in json.loads(out)
