"""Where cases come from: data sets with a name, folders and files; which of them are used, and with which pictures."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from mmedit_cli.errors import DataError, near_miss
from mmedit_cli.knowledge.data.shared.audit import Finding
from mmedit_cli.knowledge.data.shared.cases import FORMAT, CaseReader
from mmedit_cli.knowledge.data.shared.files import FORMATS, form
from mmedit_cli.knowledge.data.shared.selection import (
    Pictures,
    change,
    read_subset,
    select,
)
from mmedit_cli.output import Output
from mmedit_cli.pictures import picture_digest
from mmedit_cli.reading import PACKED, shorten
from mmedit_cli.registry import datasets
from mmedit_cli.types import EditCase, Query

CLEAN = "clean"  # the subset that shares nothing with the training side
CHAT = "chat"  # the one template that data of any kind can be asked with
_HELP = (
    "give a folder with a cases.jsonl, a .jsonl, .json, .csv or .tsv file (or its .gz), "
    "or a data set of `mmedit list`"
)
_MOST_PROBLEMS = 20
_MOST_IGNORED = 10


@dataclass(frozen=True)
class DataOptions:
    """Where the files lie, and what is taken from them.

    root: folder of a published data set, if not where it is downloaded to; images: folder the pictures are named in;
    template: how texts become prompts (empty: the default of the data set); subset: `clean` or the file of a list;
    skip_missing: go on without the queries whose picture is not there; skip_long: without those that are longer than
    the model reads.
    """

    root: Path | None = None
    images: Path | None = None
    template: str = ""
    subset: str = ""
    skip_missing: bool = False
    skip_long: bool = False


class Dataset(ABC):
    """A data set with a name; `splits` are what may follow it after a colon, the `default` one if nothing does."""

    name: str
    splits: Sequence[str]
    default: ClassVar[str] = "eval"
    # the default of `--template`; empty: texts are asked as they are written
    template: str = ""
    # splits whose cases build on the ones before them: they have one order
    chained: Sequence[str] = ()

    @abstractmethod
    def cases(
        self, split: str, options: DataOptions, problems: list[str]
    ) -> Iterator[EditCase]:
        """Yield the cases of a split in file order; malformed records go to `problems`. Images need not be there.

        Raises DataError if the files are not there.
        """

    @abstractmethod
    def check(self, split: str, options: DataOptions) -> Iterator[Finding]:
        """Audit a split (empty: all of them), apart from its pictures."""

    def subset(self, split: str, options: DataOptions) -> Path:
        """Return the file of the clean list of a split; raise DataError if there is none."""
        raise DataError(
            f"--subset {CLEAN}: {self.name}:{split} has no such list",
            "it is made for published data sets",
        )

    def layout(self, options: DataOptions) -> str:
        """Return in one line where the pictures are expected."""
        return "the pictures come with the data"

    def form(self, split: str) -> str:
        """Return in one line what a record of a split looks like."""
        return FORMAT

    def split(self, name: str) -> str:
        """Return the split of that name (empty: the default one); raise DataError if there is none."""
        if name and name not in self.splits:
            near = near_miss(name, self.splits)
            known = ", ".join(self.splits)
            raise DataError(
                f"--data {self.name}:{name}: no such split{near}",
                f"it has {known}",
            )
        return name or self.default


@dataclass(frozen=True)
class Data:
    """Cases, the name of where they come from, and how they were chosen (plain values, for the report)."""

    name: str
    cases: list[EditCase]
    selection: dict[str, Any] = field(default_factory=dict)


def find_dataset(data: str | Path) -> tuple[Dataset, str] | None:
    """Return the data set of that name and the split that follows after a colon; None for a file or folder."""
    name, _, split = str(data).partition(":")
    if Path(data).exists() or name not in datasets.names():
        return None
    return datasets.get(name), split


def is_chained(data: str) -> bool:
    """Whether cases build on the ones before them, in a data set with a name or in one of several joined by +."""
    for part in data.split("+"):
        named = find_dataset(part)
        if named is not None and named[0].split(named[1]) in named[0].chained:
            return True
    return False


def load_cases(
    data: str | Path, *, limit: int | None = None, options: DataOptions = DataOptions()
) -> list[EditCase]:
    """Return the cases of a data set, folder or file, in file order, at most `limit`; see `read_data`."""
    return read_data(data, limit=limit, options=options).cases


def read_data(
    data: str | Path, *, limit: int | None = None, options: DataOptions = DataOptions()
) -> Data:
    """Read a data set by name (`emojikb`, `evqa:train`), a folder with a cases.jsonl, or a file of FORMATS.

    Several joined by a plus sign (`evqa+eic`) take turns. Images are looked for but not opened. Raises DataError with
    every bad record (at most 20) and its place, and with the missing images, unless `options.skip_missing` says to go
    on without them.
    """
    if "+" in str(data) and not Path(data).exists():
        return _pooled(str(data), limit, options)
    problems: list[str] = []
    ignored: list[str] = []
    named = find_dataset(data)
    template = options.template
    if named is not None:
        dataset, split = named
        split = dataset.split(split)
        name = str(data)
        records = dataset.cases(split, options, problems)
        layout = dataset.layout(options)
        record_form = dataset.form(split)
        template = template or dataset.template
    else:
        path = own_file(data)
        name = _name_of(path)
        records = own_cases(path, options, problems, ignored)
        layout = f"images are named relative to {options.images or path.parent}"
        record_form = FORMAT
    if options.subset:
        subset = read_subset(_subset_file(data, named, options))
        records = select(records, subset)
    pictures = Pictures(options.skip_missing)
    cases: list[EditCase] = []
    for case in records:
        usable = pictures.check(case)
        if usable is not None:
            cases.append(usable)
        if limit is not None and len(cases) + len(problems) >= limit:
            break
    lines = _most(problems, data) + pictures.problems(str(data))
    hint = layout if pictures.missing and not problems else record_form
    if lines:
        raise DataError(lines, hint)
    if not cases:
        raise DataError(f"{data}: no cases in it", hint)
    if ignored:
        Output().note(f"{data}: {not_read(ignored)}")
    selection = _selection(options, template) | pictures.skipped()
    return Data(name, cases, selection)


def not_read(names: Sequence[str]) -> str:
    """Say which columns or keys of a file are not read."""
    named = ", ".join(shorten(name) for name in names[:_MOST_IGNORED])
    more = len(names) - _MOST_IGNORED
    if more > 0:
        named += f", and {more:,} more"
    return f"not read, as they mean nothing here: {named}"


def _selection(options: DataOptions, template: str) -> dict[str, Any]:
    """Return what a report says of the way the cases were chosen and written."""
    selection: dict[str, Any] = {}
    if template:
        selection["template"] = template
    if options.subset:
        selection["subset"] = Path(options.subset).name
    if options.skip_long:
        selection["skip_long"] = True
    return selection


def _name_of(path: Path) -> str:
    """Return what a user's own data are called: the name of the folder, or of the file."""
    if path.name.startswith("cases.jsonl"):
        return path.parent.name
    return Path(path.name.removesuffix(PACKED)).stem


def _pooled(data: str, limit: int | None, options: DataOptions) -> Data:
    """Return the cases of several data sets in turn, until the shortest has no more: every stretch holds equal shares.

    So K edits in a row are K / n of each, the cross-task setting of UniKE (Pan et al. 2024).
    """
    names = data.split("+")
    share = None if limit is None else math.ceil(limit / len(names))
    parts = [read_data(name, limit=share, options=options) for name in names]
    renamed = []
    selection = {}
    for part in parts:
        renamed.append([_of_part(case, part.name) for case in part.cases])
        if part.selection:
            selection[part.name] = part.selection
    turns = zip(*renamed, strict=False)
    cases = list(chain.from_iterable(turns))[:limit]
    name = "+".join(part.name for part in parts)
    return Data(name, cases, {"pooled": selection} if selection else {})


def _of_part(case: EditCase, part: str) -> EditCase:
    """Return a case whose names say which of several data sets it is of."""
    concept = f"{part}:{case.concept}" if case.concept else ""
    return replace(case, uid=f"{part}:{case.uid}", concept=concept)


def own_file(data: str | Path) -> Path:
    """Return the file of a user's own data: a folder's cases.jsonl, or the file itself; raise DataError if none."""
    path = Path(data)
    if path.is_dir():
        plain = path / "cases.jsonl"
        packed = plain.with_name(plain.name + PACKED)
        path = packed if packed.is_file() and not plain.is_file() else plain
    if not path.is_file():
        problem = f"{data}: no such file, folder or data set{near_miss(str(data), datasets.names())}"
        raise DataError(problem, _HELP)
    if form(path) not in FORMATS:
        raise DataError(f"{data}: not one of {', '.join(FORMATS)}", _HELP)
    return path


def own_cases(
    path: Path,
    options: DataOptions,
    problems: list[str],
    ignored: list[str] | None = None,
) -> Iterator[EditCase]:
    """Yield the cases of a file in the project's own formats, asked as they are written or as a chat.

    The names of keys and columns that mean nothing here go to `ignored`.
    """
    if options.template not in ("", CHAT):
        raise DataError(
            f"--template {options.template}: {path} is asked as it is written, or with --template {CHAT}",
            "leave --template out",
        )
    reader = CaseReader(path, problems, options.images)
    known: list[str] = [] if ignored is None else ignored
    for case in reader.cases():
        known += list(reader.ignored)[len(known) :]
        yield change(case, _as_chat) if options.template == CHAT else case


def _as_chat(query: Query) -> Query:
    return replace(query, chat=True)


def _subset_file(
    data: str | Path, named: tuple[Dataset, str] | None, options: DataOptions
) -> Path:
    if options.subset != CLEAN:
        return Path(options.subset)
    if named is None:
        raise DataError(
            f"--subset {CLEAN}: {data} has no such list",
            "give the file of a list, or leave it out",
        )
    dataset, split = named
    return dataset.subset(dataset.split(split), options)


def _most(problems: list[str], data: str | Path) -> list[str]:
    more = len(problems) - _MOST_PROBLEMS
    if more <= 0:
        return problems
    return [*problems[:_MOST_PROBLEMS], f"{data}: and {more} more problems"]


def fingerprint(cases: Iterable[EditCase]) -> str:
    """Return a digest of all texts and of the content of all images; raise DataError if an image is gone."""
    digest = hashlib.sha256()
    images: dict[Path | None, str | None] = {None: None}
    for case in cases:
        for column, queries in case.columns():
            for query in queries:
                if query.image is not None and query.image not in images:
                    images[query.image] = _digest(query.image, case)
                facts = _facts(
                    case,
                    column,
                    query,
                    images[query.image],
                )
                text = json.dumps(facts, ensure_ascii=False)
                digest.update(text.encode())
    return digest.hexdigest()[:16]


def _facts(case: EditCase, column: str, query: Query, picture: str | None) -> list[Any]:
    facts = [
        case.uid,
        case.type,
        column,
        query.prompt,
        query.target,
        picture,
        query.background,
    ]
    return [*facts, CHAT] if query.chat else facts


def _digest(image: Path, case: EditCase) -> str:
    try:
        return picture_digest(image)
    except DataError as error:
        raise DataError(f"{case.place}: {error.problems[0]}", error.hint) from error
