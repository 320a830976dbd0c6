"""EmojiKB: 1,182 things drawn by up to four artists, facts about them, and edits of what a model knows of them.

The audit counts what is there and looks for what makes a benchmark lie: missing or altered pictures, malformed
records, edits that contradict each other, probes that another edit of the same stream spoils, and anything shared
between the sides. `problems` is empty for a sound folder; everything else is for reading.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Any, final

from mmedit_cli.errors import DataError
from mmedit_cli.knowledge.data.base import DataOptions, Dataset, own_cases
from mmedit_cli.knowledge.data.emojikb_open import OpenWorld, findings, records_file
from mmedit_cli.knowledge.data.shared.audit import Finding
from mmedit_cli.packed import compare, differences, loose, unpack_beside
from mmedit_cli.reading import (
    PACKED,
    parse_json,
    read_json,
    read_json_lines,
    read_json_object,
    read_lines,
)
from mmedit_cli.registry import emojikb_home
from mmedit_cli.storage import sha256_of
from mmedit_cli.types import EditCase

SPLITS = ("train", "val", "eval", "corrections")
# corrections are facts of the evaluation side that the model that comes along gets wrong: neither is trained on
# the eval cases with the columns of the open world, and those for training with the artists and words it may see
OPEN, OPEN_TRAIN, OPEN_VAL = "open", "open-train", "open-val"
_OPENED = {OPEN: "eval", OPEN_TRAIN: "train", OPEN_VAL: "val"}
SAME_SIDE = {"eval", "corrections"}
SUFFIX = f".jsonl{PACKED}"  # of the files of records
FAMILIES = ("generality", "locality", "portability", "needs")
# the one type whose answer depends on the colour behind the picture
ON_BACKGROUND = "background"
_QUERY_KEYS = {"prompt", "target", "image", "background"}
# what is wrong with the cases of one file
_SORTS_OF_PROBLEMS = (
    "malformed",
    "missing_pictures",
    "contradictions",
    "spoilt_probes",
    "duplicates",
)

Json = dict[str, Any]


@dataclass
class Split:
    """What the records of one case file use."""

    cases: list[tuple[str, Json]] = field(default_factory=list)  # place, record
    malformed: list[str] = field(default_factory=list)
    concepts: set[str] = field(default_factory=set)
    images: set[str] = field(default_factory=set)
    requests: set[tuple[str, str]] = field(default_factory=set)  # question, picture
    locality: set[tuple[str, str]] = field(default_factory=set)
    answers: set[tuple[str, str]] = field(default_factory=set)  # question, new answer


def normal(text: str) -> str:
    """Lower case, no punctuation, single blanks: two wordings that differ in these alone are one."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


def concept_of(image: str) -> str:
    """`noto/1f34e.png` -> `1f34e`: the artists' folders hold the same concepts."""
    return PurePosixPath(image).stem


def concepts_in(folder: Path) -> list[Json]:
    """Return the records of all concepts; raise DataError where EmojiKB is not there."""
    path = folder / f"concepts{SUFFIX}"
    if not path.is_file():
        raise DataError(
            f"{path}: not there", "the data come along with mmedit: install it again"
        )
    return [record.values for record in read_json_lines(path)]


def queries(case: Json) -> Iterator[tuple[str, Json]]:
    """Yield (column, query): `request`, `generality.text`, ..."""
    yield "request", case["request"]
    for family in FAMILIES:
        for name, items in case.get(family, {}).items():
            for query in items:
                yield f"{family}.{name}", query


def faults(case: Json) -> Iterator[str]:
    """What is wrong with the form of one record."""
    for key in ("id", "type", "request", "generality", "locality"):
        if not case.get(key):
            yield f"no {key}"
            return
    for column, query in queries(case):
        fault = _fault_of_query(column, query)
        wanted = case["request"].get("target")
        is_general = column.startswith("generality")
        if fault:
            yield f"{column}: {fault}"
        elif is_general and query["target"] != wanted:
            yield f"{column}: asks for another answer than the request"


def _fault_of_query(column: str, query: Json) -> str:
    """Return what is wrong with the form of a query, empty if nothing is."""
    if (
        not isinstance(query, dict)
        or not query.get("prompt")
        or not query.get("target")
    ):
        return "a query needs a prompt and a target"
    unknown = sorted(set(query) - _QUERY_KEYS)
    if unknown:
        return f"unknown keys {unknown}"
    if "background" in query:
        background = query["background"]
        if not re.fullmatch("#[0-9a-f]{6}", background):
            return f"background {background!r} is no colour"
    if ("background" in query) != ("image" in query):
        return "a picture and its background come together"
    if column == "locality.text" and "image" in query:
        return "a picture where none belongs"
    return ""


def read_split(path: Path) -> Split:
    """Read a case file; malformed records are named with their line and left out."""
    split = Split()
    for number, line in read_lines(path):
        place = f"{path.name}:{number}"
        try:
            case = parse_json(line, place)
            found = list(faults(case))
        except DataError as error:
            found = [problem.removeprefix(f"{place}: ") for problem in error.problems]
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            found = [f"{type(error).__name__}: {error}"]
        if found:
            split.malformed += [f"{place}: {fault}" for fault in found]
        else:
            split.cases.append((place, case))
    return split


def collect(split: Split, folder: Path, digests: dict[str, str]) -> list[str]:
    """Fill in what the cases use; pictures count by content. Returns the places of pictures that are not there."""
    missing = []
    for place, case in split.cases:
        for column, query in queries(case):
            image = query.get("image", "")
            content = ""
            if image:
                if image not in digests:
                    path = folder / image
                    digests[image] = sha256_of(path) if path.is_file() else ""
                if not digests[image]:
                    missing.append(f"{place}: {column}: {image} is missing")
                content = digests[image] or image
                split.concepts.add(concept_of(image))
                split.images.add(content)
            item = (normal(query["prompt"]), content)
            if column.startswith("locality"):
                split.locality.add(item)
            elif column == "request" or column.startswith("generality"):
                split.requests.add(item)
        request = case["request"]
        answer = (normal(request["prompt"]), normal(request["target"]))
        split.answers.add(answer)
    return missing


# concept, type of question, and the colour where it matters
Fact = tuple[str, str, str]


def question_types(folder: Path) -> dict[str, str]:
    """Map every wording of a question about a picture to its type."""
    path = folder / "templates.json"
    templates = read_json(path) if path.is_file() else {}
    types = {}
    for name, forms in templates.items():
        for text in forms.get("image", ()):
            wording = normal(text)
            types[wording] = name
    return types


def fact_of(query: Json, types: dict[str, str]) -> Fact | None:
    """The fact about a picture that a query is about: concept, type, and the colour where it matters."""
    if "image" not in query:
        return None
    question = normal(query["prompt"])
    kind = types.get(question, question)
    colour = query["background"] if kind == ON_BACKGROUND else ""
    return concept_of(query["image"]), kind, colour


def clashes(
    split: Split, types: dict[str, str]
) -> tuple[list[str], list[str], list[str]]:
    """Edits that contradict each other; probes that ask what another edit changes; repeated ids and requests."""
    edited, contradictory = _edited_facts(split, types)
    spoilt = _spoilt_probes(split, types, edited)
    return contradictory, spoilt, _repeated_names(split)


def _edited_facts(
    split: Split, types: dict[str, str]
) -> tuple[dict[Fact, tuple[str, str]], list[str]]:
    """Return target and place of the first edit of each fact, and the edits that contradict one."""
    edited: dict[Fact, tuple[str, str]] = {}
    contradictory = []
    for place, case in split.cases:
        fact = fact_of(case["request"], types)
        target = case["request"]["target"]
        if fact is None:
            continue
        earlier, where = edited.setdefault(fact, (target, place))
        if earlier != target:
            contradictory.append(f"{place}: {target!r}, but {where} says {earlier!r}")
    return edited, contradictory


def _spoilt_probes(
    split: Split, types: dict[str, str], edited: Mapping[Fact, tuple[str, str]]
) -> list[str]:
    """Return the probes that ask what an edit of another case changes."""
    spoilt = []
    for place, case in split.cases:
        for column, query in queries(case):
            fact = fact_of(query, types)
            if fact is None or fact not in edited:
                continue
            must_stay = column.startswith(("locality", "portability"))
            if not must_stay:
                continue
            target, where = edited[fact]
            if target != query["target"]:
                spoilt.append(f"{place}: {column}: {where} edits what is asked here")
    return spoilt


def _repeated_names(split: Split) -> list[str]:
    """Return the ids and requests that more than one case has."""
    names: Counter[str] = Counter()
    for _, case in split.cases:
        names.update([case["id"], json.dumps(case["request"])])
    repeated = []
    for name, count in names.items():
        if count > 1:
            repeated.append(f"{name} stands {count} times")
    return repeated


def check_files(folder: Path) -> list[str]:
    """Compare every file with the manifest, both ways, and what is unpacked with the zip that it comes from."""
    path = folder / "manifest.json"
    if not path.is_file():
        return ["manifest.json is missing"]
    wanted = read_json_object(path).mapping("files")
    problems = []
    for archive in sorted(folder.glob("*.zip")):
        problems += differences(archive)
    found = [file for file in loose(folder) if file != path]
    return problems + compare(folder, found, wanted, sha256_of, "the manifest")


def leaks(one: Split, other: Split) -> dict[str, list[str]]:
    """What two sides share, by sort; a text-only question has an empty picture."""
    edited_there = one.locality & other.requests
    edited_here = one.requests & other.locality
    shared: dict[str, set[Any]] = {
        "concepts": one.concepts & other.concepts,
        "images": one.images & other.images,
        "requests": one.requests & other.requests,
        "locality": one.locality & other.locality,
        "crossed": edited_here | edited_there,
    }
    found = {}
    for sort, items in shared.items():
        found[sort] = sorted(map(str, items))
    return found


def audit(folder: Path) -> Json:
    """Count and check a folder in EmojiKB's layout. `problems` lists all that is wrong, as one-line statements."""
    folder = Path(folder)
    types = question_types(folder)
    digests: dict[str, str] = {}
    problems = [f"files: {line}" for line in check_files(folder)]
    splits: dict[str, Split] = {}
    cases: Json = {}
    for name in SPLITS:
        path = folder / f"{name}{SUFFIX}"
        if not path.is_file():
            if name != "corrections":  # they are made for a model, if at all
                problems.append(f"{path.name} is missing")
            continue
        split = splits[name] = read_split(path)
        missing = collect(split, folder, digests)
        contradictory, spoilt, repeated = clashes(split, types)
        by_type: Counter[str] = Counter()
        by_column: Counter[str] = Counter()
        facts = set()
        for _, case in split.cases:
            by_type[case["type"]] += 1
            by_column.update(column for column, _ in queries(case))
            facts.add(fact_of(case["request"], types))
        cases[name] = {
            "cases": len(split.cases),
            "types": dict(sorted(by_type.items())),
            "columns": dict(sorted(by_column.items())),
            "edited_facts": len(facts),
            "concepts": len(split.concepts),
            "malformed": split.malformed,
            "missing_pictures": missing,
            "contradictions": contradictory,
            "spoilt_probes": spoilt,
            "duplicates": repeated,
        }
        for sort in _SORTS_OF_PROBLEMS:
            label = sort.replace("_", " ")
            problems += [f"{label}: {line}" for line in cases[name][sort]]
    found: dict[str, dict[str, list[str]]] = {}
    same: dict[str, int] = {}
    for one, other in combinations(splits, 2):
        if {one, other} == SAME_SIDE:
            continue
        pair = f"{one}-{other}"
        found[pair] = leaks(splits[one], splits[other])
        same[pair] = len(splits[one].answers & splits[other].answers)
    for pair, shared in found.items():
        for sort, items in shared.items():
            problems += [f"leak {pair}: {sort}: {item}" for item in items]
    concepts = concepts_in(folder)
    pictures = list(folder.glob("*/*.png"))
    return {
        "concepts": len(concepts),
        "flags": sum("country" in concept for concept in concepts),
        "pictures": len(pictures),
        "picture_bytes": sum(path.stat().st_size for path in pictures),
        "splits": cases,
        "leaks": found,
        # small vocabularies ("animals") are shared on purpose: no leak
        "shared_question_and_answer": same,
        "licences": _licences(folder),
        "problems": problems,
    }


def _licences(folder: Path) -> dict[str, str]:
    """Return package and licence of each source, as the manifest names them."""
    path = folder / "manifest.json"
    if not path.is_file():
        return {}
    licences = {}
    for name, source in read_json_object(path).mapping("sources", {}).items():
        licences[name] = f"{source['package']}, {source['licence']}"
    return licences


@final
class EmojiKBDataset(Dataset):
    """The data that come along: a case file a split, pictures beside them."""

    name = "emojikb"
    splits = (*SPLITS, *_OPENED)
    # the columns of `eval`, which are all that version 0.1 has, and those of the open world
    default = OPEN

    def __init__(self, folder: Path | None = None) -> None:
        """Read what lies in `folder`, else the data that come along."""
        self._folder = folder

    @property
    def folder(self) -> Path:
        """Where the records and the pictures are."""
        return self._folder or emojikb_home()

    def cases(
        self, split: str, options: DataOptions, problems: list[str]
    ) -> Iterator[EditCase]:
        """Yield the cases of a split; raise DataError if the file is not there."""
        unpack_beside(self.folder)  # whoever reads them looks for their pictures
        name = _OPENED.get(split, split)
        path = records_file(self.folder, name)
        cases = own_cases(path, replace(options, images=None), problems)
        if split in _OPENED:
            cases = map(OpenWorld.read(self.folder, name).opened, cases)
        yield from map(_with_concept, cases)

    def layout(self, options: DataOptions) -> str:
        """Return in one line how pictures come back."""
        return f"pictures are unpacked from the zips in {self.folder}: delete the folder of what is missing"

    def check(self, split: str, options: DataOptions) -> Iterator[Finding]:
        """Audit the folder: counts, leaks between splits, licences, and every problem."""
        unpack_beside(self.folder)
        found = audit(self.folder)
        for key in ("concepts", "flags", "pictures"):
            yield key, True, f"{found[key]:,}"
        for name, counts in found["splits"].items():
            types = []
            for kind, count in counts["types"].items():
                types.append(f"{kind} {count}")
            listed = ", ".join(types)
            yield f"{name} cases", True, f"{counts['cases']:,}: {listed}"
        for pair, shared in found["leaks"].items():
            sorts = []
            for sort, items in shared.items():
                sorts.append(f"{sort} {len(items)}")
            is_clean = not any(shared.values())
            yield f"leaks {pair}", is_clean, ", ".join(sorts)
        if (self.folder / "artists.json").is_file():
            yield from findings(self.folder)
        for source, licence in found["licences"].items():
            yield f"licence {source}", True, licence
        for problem in found["problems"]:
            yield "problem", False, problem


def _with_concept(case: EditCase) -> EditCase:
    """Return a case with the thing that its request is about."""
    assert case.request.image is not None, case.uid
    concept = concept_of(case.request.image.as_posix())
    return replace(case, concept=concept)


DATASET = EmojiKBDataset()
