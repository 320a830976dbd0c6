"""Facts about drawings: what every set of them promises, and what is said of files that are wrong."""

from __future__ import annotations

import csv
import json

import pytest

from mmedit_cli.drawing.data.facts import COLUMNS, EFFICACY, GENERALITY, SPECIFICITY
from mmedit_cli.drawing.data.opening_facts import SPLITS, open_facts
from mmedit_cli.errors import DataError

NUMBERS = range(1, 6)


def timed_row(old="A rose"):
    row = {"old": old, "new": f"{old}, blue"}
    for i in NUMBERS:
        row |= {f"positive{i}": f"{old} {i}", f"gt{i}": f"{old} {i}, blue"}
        row |= {f"negative{i}": f"A poppy {i}", f"gn{i}": f"A poppy {i}, blue"}
    return row


def road_row(kind="Role"):
    row = {"Type": kind, "Prompt": "The queen of cakes", "Oracle": "Ann, a baker"}
    row |= {"Old": "Bea", "New": "Ann"}
    for i in NUMBERS:
        row |= {
            f"Positive{i}": f"The queen of cakes {i}",
            f"Positive_oracle{i}": f"Ann {i}",
            f"Positive_old{i}": f"Bea {i}",
            f"Positive_new{i}": f"Ann {i}",
            f"Negative{i}": f"The king of tea {i}",
            f"Negative_new{i}": f"Ann, king of tea {i}",
        }
    return row


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def root(tmp_path):
    """Published tables, written as their authors do."""
    for name in ("test_set", "test_set_filtered_SD14", "validation_set"):
        write(tmp_path / f"TIMED_{name}.csv", [timed_row(), timed_row("A hut")])
    write(tmp_path / "test.csv", [road_row(), road_row("Appearance")])
    validation = [road_row()]
    for i in NUMBERS:
        del validation[0][f"Positive_oracle{i}"]
    write(tmp_path / "valid.csv", validation)
    return tmp_path


@pytest.mark.parametrize(
    "data", [f"{name}:{split}" for name, splits in SPLITS.items() for split in splits]
)
def test_every_fact_can_be_made_and_judged(data, root):
    found = open_facts(data, root=root)
    assert len({fact.name for fact in found.facts}) == len(found.facts) > 0
    assert found.asks or found.compares
    for fact in found.facts:
        assert fact.change.source.strip()
        columns = {probe.column for probe in fact.probes}
        assert {EFFICACY, GENERALITY, SPECIFICITY} <= columns <= set(COLUMNS)
        for probe in fact.probes:
            # what is to be there or gone is not what the prompt of another column asks for
            assert probe.prompt.strip()
            assert probe.answer or probe.texts
            if probe.texts:
                assert probe.texts[0] != probe.texts[1]
    assert found.fingerprint() == open_facts(data, root=root).fingerprint()
    assert open_facts(data, root=root, limit=1).facts == found.facts[:1]


def things_of(found):
    """The texts that a set draws, edits or keeps, without the styles."""
    texts = set()
    for fact in found.facts:
        if fact.kind != "style":
            texts |= {fact.change.source, *fact.change.keep}
            texts |= {p.answer for p in fact.probes if p.question == "What is this?"}
    return texts


def test_the_sides_of_emojikb_share_no_thing_and_no_style():
    evaluation, training = map(open_facts, ("emojikb-facts", "emojikb-facts:train"))
    assert things_of(evaluation).isdisjoint(things_of(training))
    styles = [
        {fact.change.source for fact in found.facts if fact.kind == "style"}
        for found in (evaluation, training)
    ]
    assert len(styles[0]) == len(styles[1]) == 2
    assert styles[0].isdisjoint(styles[1])


def test_there_are_fifty_edits_of_each_kind_and_the_first_are_of_all():
    found = open_facts("emojikb-facts")
    counts = {kind: sum(f.kind == kind for f in found.facts) for kind in found.kinds}
    assert counts == {"drawn as": 50, "background": 50, "erased": 50, "style": 2}
    assert {fact.kind for fact in found.facts[:4]} == set(found.kinds)


def test_edits_made_at_once_do_not_spoil_each_other():
    """No text is edited twice, is another's target, or is kept or drawn as another thing while it is edited."""
    found = open_facts("emojikb-facts")
    for kind in found.kinds:
        facts = [fact for fact in found.facts if fact.kind == kind]
        sources = {fact.change.source for fact in facts}
        assert len(sources) == len(facts)
        for fact in facts:
            assert sources.isdisjoint({*fact.change.targets, *fact.change.keep})
            others = [p.prompt for p in fact.probes if p.column == SPECIFICITY]
            if kind != "style":
                assert not [t for t in others for s in sources if t.endswith(s)]


def test_what_rows_of_published_tables_ask(root):
    (rose, _) = open_facts("timed", root=root).facts
    assert (rose.change.source, rose.change.targets) == ("A rose", ("A rose, blue",))
    columns = [probe.column for probe in rose.probes]
    assert columns == [EFFICACY, *[GENERALITY] * 5, *[SPECIFICITY] * 5]
    assert rose.probes[2].texts == ("A rose 2, blue", "A rose 2")
    assert rose.probes[6].texts == ("A poppy 1", "A poppy 1, blue")
    queen, other = open_facts("road", root=root).facts
    assert (queen.kind, other.kind) == ("role", "appearance")
    assert queen.change.targets == ("Ann",)
    assert queen.probes[0].texts == ("Ann", "Bea")
    assert queen.probes[1].texts == ("Ann 1", "Bea 1")
    assert len(open_facts("road:validation", root=root).facts) == 1
    assert len(open_facts("road", root=root / "test.csv").facts) == 2


def test_too_few_things(tmp_path):
    told = {"taught": ["1f412", "1f98d"], "held_out": ["1f42b"]}
    (tmp_path / "concepts.json").write_text(json.dumps(told))
    with pytest.raises(DataError, match="too few things of the eval side were taught"):
        open_facts("emojikb-facts", model=tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("emojikb-fact", "did you mean emojikb-facts"),
        ("timed:test2", "no split test2 .did you mean test"),
        ("timed", "no TIMED_test_set.csv in"),
        ("road", "no table of it for test in"),
    ],
)
def test_what_is_not_there(data, message, tmp_path):
    with pytest.raises(DataError, match=message):
        open_facts(data, root=tmp_path)


def test_tables_that_are_wrong(root):
    path = root / "TIMED_test_set.csv"
    write(path, [timed_row() | {"gt3": " "}, timed_row()])
    with pytest.raises(DataError, match=r"set.csv:2: gt3 is missing"):
        open_facts("timed", root=root)
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(DataError, match="no rows in it"):
        open_facts("timed", root=root)
    write(root / "again.csv", [road_row()])
    with pytest.raises(DataError, match=r"2 tables in .*: again.csv, test.csv"):
        open_facts("road", root=root)
