"""EmojiKB: 1,182 things drawn by up to four artists, facts about them, and edits of what a model knows of them.

The audit counts what is there and looks for what makes a benchmark lie: missing or altered pictures, malformed
records, edits that contradict each other, probes that another edit of the same stream spoils, and anything shared
between the sides. `problems` is empty for a sound folder; everything else is for reading.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Any, final

from mmedit_cli.errors import DataError
from mmedit_cli.knowledge.data.base import DataOptions, Dataset, own_cases
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
SAME_SIDE = {
    "eval",
    "corrections",
}  # what the model that comes along gets wrong, of the evaluation side: never trained on
SUFFIX = f".jsonl{PACKED}"  # of the files of records
FAMILIES = ("generality", "locality", "portability", "needs")
ON_BACKGROUND = (
    "background"  # the one type whose answer depends on the colour behind the picture
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
        if (
            not isinstance(query, dict)
            or not query.get("prompt")
            or not query.get("target")
        ):
            yield f"{column}: a query needs a prompt and a target"
        elif set(query) - {"prompt", "target", "image", "background"}:
            yield f"{column}: unknown keys {sorted(set(query) - {'prompt', 'target', 'image', 'background'})}"
        elif "background" in query and not re.fullmatch(
            "#[0-9a-f]{6}", query["background"]
        ):
            yield f"{column}: background {query['background']!r} is no colour"
        elif ("background" in query) != ("image" in query):
            yield f"{column}: a picture and its background come together"
        elif column == "locality.text" and "image" in query:
            yield f"{column}: a picture where none belongs"
        elif column.startswith("generality") and query["target"] != case["request"].get(
            "target"
        ):
            yield f"{column}: asks for another answer than the request"


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


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return sha256_of(path)


def collect(split: Split, folder: Path, digests: dict[str, str]) -> list[str]:
    """Fill in what the cases use; pictures count by content. Returns the places of pictures that are not there."""
    missing = []
    for place, case in split.cases:
        for column, query in queries(case):
            image = query.get("image", "")
            if image and image not in digests:
                exists = (folder / image).is_file()
                digests[image] = digest(folder / image) if exists else ""
            if image and not digests[image]:
                missing.append(f"{place}: {column}: {image} is missing")
            if image:
                split.concepts.add(concept_of(image))
                split.images.add(digests[image] or image)
            item = (normal(query["prompt"]), digests[image] or image if image else "")
            if column.startswith("locality"):
                split.locality.add(item)
            elif column == "request" or column.startswith("generality"):
                split.requests.add(item)
        split.answers.add(
            (normal(case["request"]["prompt"]), normal(case["request"]["target"]))
        )
    return missing


def question_types(folder: Path) -> dict[str, str]:
    """Map every wording of a question about a picture to its type."""
    path = folder / "templates.json"
    templates = read_json(path) if path.is_file() else {}
    return {
        normal(text): name
        for name, forms in templates.items()
        for text in forms.get("image", ())
    }


def fact_of(query: Json, types: dict[str, str]) -> tuple[str, str, str] | None:
    """The fact about a picture that a query is about: concept, type, and the colour where it matters."""
    if "image" not in query:
        return None
    kind = types.get(normal(query["prompt"]), normal(query["prompt"]))
    return (
        concept_of(query["image"]),
        kind,
        query["background"] if kind == ON_BACKGROUND else "",
    )


def clashes(
    split: Split, types: dict[str, str]
) -> tuple[list[str], list[str], list[str]]:
    """Edits that contradict each other; probes that ask what another edit changes; repeated ids and requests."""
    edited: dict[tuple[str, str, str], tuple[str, str]] = {}
    contradictory = []
    for place, case in split.cases:
        key = fact_of(case["request"], types)
        target = case["request"]["target"]
        if key and edited.setdefault(key, (target, place))[0] != target:
            contradictory.append(
                f"{place}: {target!r}, but {edited[key][1]} says {edited[key][0]!r}"
            )
    spoilt = []
    for place, case in split.cases:
        for column, query in queries(case):
            key = fact_of(query, types)
            if (
                key in edited
                and column.startswith(("locality", "portability"))
                and edited[key][0] != query["target"]
            ):
                spoilt.append(
                    f"{place}: {column}: {edited[key][1]} edits what is asked here"
                )
    names = Counter(
        name
        for _, case in split.cases
        for name in (case["id"], json.dumps(case["request"]))
    )
    return (
        contradictory,
        spoilt,
        [f"{name} stands {count} times" for name, count in names.items() if count > 1],
    )


def check_files(folder: Path) -> list[str]:
    """Compare every file with the manifest, both ways, and what is unpacked with the zip that it comes from."""
    path = folder / "manifest.json"
    if not path.is_file():
        return ["manifest.json is missing"]
    wanted = read_json_object(path).mapping("files")
    unpacked = [
        line
        for archive in sorted(folder.glob("*.zip"))
        for line in differences(archive)
    ]
    found = [file for file in loose(folder) if file != path]
    return unpacked + compare(folder, found, wanted, digest, "the manifest")


def leaks(one: Split, other: Split) -> dict[str, list[str]]:
    """What two sides share, by sort; a text-only question has an empty picture."""
    sorts = ("concepts", "images", "requests", "locality")
    shared = {sort: getattr(one, sort) & getattr(other, sort) for sort in sorts}
    shared["crossed"] = (one.requests & other.locality) | (
        one.locality & other.requests
    )
    return {sort: sorted(map(str, items)) for sort, items in shared.items()}


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
            problems += (
                [f"{path.name} is missing"] if name != "corrections" else []
            )  # made for a model, if at all
            continue
        split = splits[name] = read_split(path)
        missing = collect(split, folder, digests)
        contradictory, spoilt, repeated = clashes(split, types)
        cases[name] = {
            "cases": len(split.cases),
            "types": dict(
                sorted(Counter(case["type"] for _, case in split.cases).items())
            ),
            "columns": dict(
                sorted(
                    Counter(
                        column for _, case in split.cases for column, _ in queries(case)
                    ).items()
                )
            ),
            "edited_facts": len(
                {fact_of(case["request"], types) for _, case in split.cases}
            ),
            "concepts": len(split.concepts),
            "malformed": split.malformed,
            "missing_pictures": missing,
            "contradictions": contradictory,
            "spoilt_probes": spoilt,
            "duplicates": repeated,
        }
        for sort in (
            "malformed",
            "missing_pictures",
            "contradictions",
            "spoilt_probes",
            "duplicates",
        ):
            problems += [
                f"{sort.replace('_', ' ')}: {line}" for line in cases[name][sort]
            ]
    pairs = [(a, b) for a, b in combinations(splits, 2) if {a, b} != SAME_SIDE]
    found = {f"{a}-{b}": leaks(splits[a], splits[b]) for a, b in pairs}
    for pair, shared in found.items():
        problems += [
            f"leak {pair}: {sort}: {item}"
            for sort, items in shared.items()
            for item in items
        ]
    same = {f"{a}-{b}": len(splits[a].answers & splits[b].answers) for a, b in pairs}
    concepts = concepts_in(folder)
    return {
        "concepts": len(concepts),
        "flags": sum("country" in concept for concept in concepts),
        "pictures": sum(1 for _ in folder.glob("*/*.png")),
        "picture_bytes": sum(path.stat().st_size for path in folder.glob("*/*.png")),
        "splits": cases,
        "leaks": found,
        "shared_question_and_answer": same,  # small vocabularies ("animals") are shared on purpose: no leak
        "licences": _licences(folder),
        "problems": problems,
    }


def _licences(folder: Path) -> dict[str, str]:
    """Return package and licence of each source, as the manifest names them."""
    path = folder / "manifest.json"
    sources = read_json_object(path).mapping("sources", {}) if path.is_file() else {}
    return {
        name: f"{source['package']}, {source['licence']}"
        for name, source in sources.items()
    }


@final
class EmojiKBDataset(Dataset):
    """The data that come along: a case file a split, pictures beside them."""

    name = "emojikb"
    splits = SPLITS

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
        path = self.folder / f"{split}{SUFFIX}"
        if not path.is_file():
            raise DataError(
                f"{path}: not there",
                "the data come along with mmedit: install it again",
            )
        yield from own_cases(path, replace(options, images=None), problems)

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
            types = ", ".join(
                f"{name} {count}" for name, count in counts["types"].items()
            )
            yield f"{name} cases", True, f"{counts['cases']:,}: {types}"
        for pair, shared in found["leaks"].items():
            total = sum(map(len, shared.values()))
            yield (
                f"leaks {pair}",
                not total,
                ", ".join(f"{sort} {len(items)}" for sort, items in shared.items()),
            )
        for source, licence in found["licences"].items():
            yield f"licence {source}", True, licence
        yield from (("problem", False, problem) for problem in found["problems"])


DATASET = EmojiKBDataset()
