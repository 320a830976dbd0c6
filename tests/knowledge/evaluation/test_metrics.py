"""Scores: by hand, and against the published functions."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from mmedit_cli.knowledge.evaluation import metrics


@pytest.mark.parametrize(
    ("prediction", "target", "match"),
    [
        ("A green apple.", "green apple", 1),
        ("green apple, on a plate", "Green Apple", 1),
        ("green apples", "green apple", 0),
        ("it is a green apple", "green apple", 0),
        ("2 dogs", "two dogs", 1),
        ("two", "2", 1),
        ("21", "2", 0),
        ("", "green", 0),
        ("the", "the", 1),
        ("Guinea-Bissau", "guinea bissau", 1),
        ("Côte d'Ivoire", "côte d'ivoire", 1),
        ("new_york", "New York", 1),
        ("-5", "5", 0),
        ("5", "-5", 0),
        ("\u22125 degrees", "-5", 1),
        ("1990-1995", "1990", 1),
        ("3.5", "3", 0),
        ("1,000 metres", "1000", 1),
        ("C++", "C", 0),
        ("C", "C++", 0),
        ("c++, since 1985", "C++", 1),
        ("C#", "C", 0),
        ("2+2", "2", 1),
        ("C\u00f4te d\u2019Ivoire", "c\u00f4te d'ivoire", 1),
        ("STRASSE", "Stra\u00dfe", 1),
        ("cafe\u0301", "caf\u00e9", 1),
        ("cafe", "caf\u00e9", 0),
        (
            "\u0915\u093f",
            "\u0915\u093e",
            0,
        ),  # ki and ka: a vowel sign is all that differs
        (
            "\u0939\u093f\u0928\u094d\u0926\u0940 \u0939\u0948",
            "\u0939\u093f\u0928\u094d\u0926\u0940",
            1,
        ),  # Hindi
        ("\u732b\u3067\u3059", "\u732b", 1),  # Japanese: it is a cat
        ("\u4eac\u90fd", "\u6771\u4eac", 0),  # Kyoto, Tokyo
        ("\u6771\u4eac\u90fd", "\u6771\u4eac", 1),
        ("\uff76\uff9e\uff72\uff84\uff9e", "\u30ac\u30a4\u30c9", 1),  # half width
        ("\uff15", "5", 1),
    ],
)
def test_answer_match(prediction, target, match):
    assert metrics.answer_match(prediction, target) == match


def test_strict_match_and_f1():
    assert metrics.exact_match(" green apple ", "green apple") == 1
    assert metrics.exact_match("Green apple", "green apple") == 0
    assert metrics.token_f1("a green apple", "green pear") == pytest.approx(0.5)
    # one of three words said, one of two wanted
    assert metrics.token_f1("a green apple tree", "green pear") == pytest.approx(0.4)
    assert metrics.token_f1("", "") == 1
    assert metrics.token_f1("", "x") == 0


def test_f1_outside_english():
    assert metrics.token_f1("\u6771\u4eac", "\u4eac\u90fd") == pytest.approx(0.5), (
        "one of two characters"
    )
    assert metrics.token_f1("\u0915\u093f", "\u0915\u093e") == 0
    assert metrics.exact_match("cafe\u0301", "caf\u00e9") == 1


def test_locality_of_texts_compares_what_was_said():
    assert metrics.same_answer("A cat.", "cat") == 1
    assert metrics.same_answer("cat", "cat dog") == 0
    assert metrics.same_answer("!!", "??") == 0, (
        "without words only the same signs are the same"
    )


def test_perfect_and_identity():
    assert metrics.agreement((1, 2), (1, 2)) == (2, 2)
    top = metrics.topk_ids(torch.randn(5, 20), 10)
    assert metrics.topk_agreement(top, top) == (50, 50)


def test_top_k_lists_of_different_length_end_at_the_same_token():
    base = torch.tensor([[1], [2], [3]])
    assert metrics.topk_agreement(base, torch.tensor([[2], [3]])) == (2, 2)
    assert metrics.topk_agreement(torch.tensor([[1], [2]]), base) == (0, 2)


def test_published_easyedit_functions(golden):
    facts = json.loads((golden / "easyedit_metrics.json").read_text())
    tensors = load_file(golden / "easyedit_metrics.safetensors")
    for i, case in enumerate(facts["cases"]):
        base, edited, labels = (
            tensors[f"case{i}.{k}"] for k in ("logits_base", "logits_edited", "labels")
        )
        for k, name in ((1, "top1"), (10, "top10")):
            pairs = [
                metrics.topk_agreement(metrics.topk_ids(b, k), metrics.topk_ids(e, k))
                for b, e in zip(base, edited, strict=True)
            ]
            pooled = sum(points for points, _ in pairs) / sum(
                total for _, total in pairs
            )
            assert pooled == pytest.approx(case[name], abs=1e-6)
        expected = tensors[
            f"case{i}.top10_base"
        ]  # cut to the shorter of the two sequences
        assert torch.equal(
            metrics.topk_ids(base, 10)[:, -expected.shape[1] :], expected
        )
        answers = labels[:, 1:] != -100
        rows = [
            metrics.agreement(e[:-1][a].argmax(-1).tolist(), want[1:][a].tolist())
            for e, want, a in zip(edited, labels, answers, strict=True)
        ]
        assert sum(e for e, _ in rows) / sum(n for _, n in rows) == pytest.approx(
            case["tok"], abs=1e-6
        )
        assert sum(e == n for e, n in rows) / len(rows) == pytest.approx(
            case["em"], abs=1e-6
        )
