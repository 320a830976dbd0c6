"""Data sets in the format of MMEdit (Cheng et al. 2023) and VLKEB (Huang et al. 2024), and how they ask."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, final

from mmedit_cli.errors import DataError, near_miss
from mmedit_cli.knowledge.data.base import CHAT, CLEAN, DataOptions, Dataset
from mmedit_cli.knowledge.data.shared import audit
from mmedit_cli.knowledge.data.shared.audit import Finding
from mmedit_cli.knowledge.data.shared.files import read_records
from mmedit_cli.reading import LARGEST_DATA, digest_of, read_json_object
from mmedit_cli.registry import cache_dir, data_home
from mmedit_cli.storage import sha256_json, write_atomic
from mmedit_cli.types import EditCase, Query

TRAIN = "train"
_TEXTS = ("src", "alt", "rephrase", "loc", "loc_ans", "m_loc_q", "m_loc_a")
_IMAGES = ("image", "image_rephrase", "m_loc")
_QUOTED_QUESTION = re.compile(r'"([^"]+\?)"')
_SHORT = "{}\nAnswer the question using a single word or phrase."  # the format prompt of LLaVA-1.5 (Liu et al. 2024)

Json = dict[str, Any]


@dataclass(frozen=True)
class Template:
    """How the texts of a record become prompts; `{}` stands for the text.

    request: the edit, its rephrasing and what follows from it; text: the question without a picture; image: the one
    about another picture. Texts are used to the letter, blanks and quotation marks included, unless `tidy`; `chat`
    asks them in the chat format of the model.
    """

    request: str = "{}"
    text: str = "{}"
    image: str = "{}"
    tidy: bool = False
    chat: bool = False

    def ask(self, kind: str, text: str, target: str, image: Path | None) -> Query:
        """Return the query for a text of a record."""
        if self.tidy:
            text = tidy(text)
            target = target.strip()
            if kind == "text" and not text.endswith("?"):
                text += "?"
        form: str = getattr(self, kind)
        prompt = form.format(text)
        return Query(prompt, target, image, chat=self.chat)


COMMON = {
    "verbatim": Template(),
    "plain": Template(tidy=True),
    CHAT: Template(_SHORT, _SHORT, _SHORT, tidy=True, chat=True),
}


def tidy(text: str) -> str:
    """Return a question without traces of its making: quotation marks, `nq question:`, a rewriter's remarks."""
    text = text.strip().removeprefix("nq question: ")
    quoted = _QUOTED_QUESTION.findall(text)
    if quoted:
        return str(quoted[-1])
    if text.count('"') == 2 and text.startswith('"') and text.endswith('"'):
        return text[1:-1]
    return text


@dataclass(frozen=True)
class AnnotationFile:
    """An annotation file below the root, and what is known of the published copy."""

    file: str
    records: int = 0  # 0: not counted
    sha256: str = ""  # empty: not known
    key: str = ""  # where the records are, if the file is no array


class Fault(ValueError):
    """What is wrong with one record."""


def read_case(record: Json, uid: str, images: Path, template: Template) -> EditCase:
    """Return the case of a record without its place; raise Fault for what cannot be used."""
    texts = check_texts(record, _TEXTS)
    image, rephrased_image, other_image = [
        _path(images, record, key) for key in _IMAGES
    ]
    question = texts["src"]
    answer = texts["alt"]
    reworded = template.ask("request", texts["rephrase"], answer, image)
    redrawn = template.ask("request", question, answer, rephrased_image)
    text_only = template.ask(
        "text",
        texts["loc"],
        texts["loc_ans"],
        None,
    )
    unrelated = template.ask(
        "image",
        texts["m_loc_q"],
        texts["m_loc_a"],
        other_image,
    )
    return EditCase(
        uid,
        request=template.ask("request", question, answer, image),
        generality={"text": (reworded,), "image": (redrawn,)},
        locality={"text": (text_only,), "image": (unrelated,)},
    )


def check_texts(record: Any, keys: Sequence[str]) -> dict[str, str]:
    """Return the texts of a record; raise Fault unless all are there and not empty."""
    if not isinstance(record, dict):
        raise Fault("must be an object with keys")
    for key in keys:
        if key not in record:
            raise Fault(f"{key} is missing{near_miss(key, record)}")
        if not isinstance(record[key], str) or not record[key].strip():
            raise Fault(f"{key}: must be a text that is not empty")
    return {key: record[key] for key in keys}


def _path(images: Path, record: Json, key: str) -> Path:
    """Return the picture of a record; the name must not lead out of the folder, links in it are the user's own."""
    name = check_texts(record, (key,))[key]
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise Fault(f"{key}: {name!r} lies outside the folder of the pictures")
    return images / name


def one_case(
    record: Json, uid: str, images: Path, template: Template
) -> list[EditCase]:
    """Return the one case of a record: the usual reader."""
    return [read_case(record, uid, images, template)]


TEXT = "text"  # the split of facts without pictures
TEXT_KEYS = "loc, loc_ans"


def text_fact(
    record: Json, uid: str, images: Path, template: Template
) -> list[EditCase]:
    """The text-only fact that a record has for its locality, as an edit of its own."""
    texts = check_texts(record, ("loc", "loc_ans"))
    request = template.ask("text", texts["loc"], texts["loc_ans"], None)
    return [EditCase(uid, request, type="text")]


Reader = Callable[[Json, str, Path, Template], list[EditCase]]


@final
@dataclass(frozen=True)
class PublishedDataset(Dataset):
    """A published data set: a file a split, and the folders in which releases have put them.

    `group` is its name in `mmedit download`. `folders` and `image_folders` are tried in order, below the root and
    below the pictures; `image_mark` is a folder that must be in the folder of the pictures (empty: none). `extras` are
    files that only the audit reads. `more_keys` says, by split, which keys its reader needs beside the usual ones, and
    `own_keys` which it needs instead of them. Data of facts in text have no group and no folders of pictures.
    """

    name: str
    sources: Mapping[str, AnnotationFile]
    templates: Mapping[str, Template]
    group: str = ""
    folders: Sequence[str] = ()
    image_folders: Sequence[str] = ()
    image_example: str = ""
    image_mark: str = ""
    readers: Mapping[str, Reader] = field(default_factory=dict)
    more_keys: Mapping[str, str] = field(default_factory=dict)
    own_keys: Mapping[str, str] = field(default_factory=dict)
    extras: Sequence[AnnotationFile] = ()
    chained: Sequence[str] = ()

    @property
    def splits(self) -> Sequence[str]:  # type: ignore[override]
        """The splits that have a file."""
        return tuple(self.sources)

    @property
    def template(self) -> str:  # type: ignore[override]
        """The first of the templates."""
        return next(iter(self.templates))

    def cases(
        self, split: str, options: DataOptions, problems: list[str]
    ) -> Iterator[EditCase]:
        """Yield the cases of a split; they are numbered from 0, as in the file."""
        template = self._template(options.template or self.template)
        read = self.readers.get(split, one_case)
        path = self.file(split, options)
        images = self.images(options)
        for index, (place, record) in enumerate(read_records(path, problems)):
            uid = f"{split}-{index}"
            try:
                for case in read(record, uid, images, template):
                    yield replace(case, place=place)
            except Fault as fault:
                problems.append(f"{place}: {fault}")

    def _template(self, name: str) -> Template:
        if name not in self.templates:
            near = near_miss(name, self.templates)
            known = ", ".join(self.templates)
            raise DataError(
                f"--template {name}: {self.name} has no such template{near}",
                f"it has {known}",
            )
        return self.templates[name]

    # -- where things are ---------------------------------------------------------------------------------------------

    def root(self, options: DataOptions) -> Path:
        """Return the folder of the annotations; raise DataError if none of their files is there."""
        root = options.root or data_home()
        for name in ("", self.group, *self.folders):
            folder = root / name
            for source in self.sources.values():
                if (folder / source.file).is_file():
                    return folder
        fetch = f"; `mmedit download {self.group}` fetches them" if self.group else ""
        raise DataError(
            f"{root}: none of the files of {self.name} is there",
            f"--root FOLDER says where {self._files()} lie{fetch}",
        )

    def file(self, split: str, options: DataOptions) -> Path:
        """Return the annotation file of a split; raise DataError if it is not there."""
        path = self.root(options) / self.sources[split].file
        if not path.is_file():
            hint = f"`mmedit download {self.group}` fetches it" if self.group else ""
            raise DataError(f"{path}: not there", hint)
        return path

    def images(self, options: DataOptions) -> Path:
        """Return the folder the pictures are named in, whether it is there or not."""
        base = options.images or self.root(options)
        if not self.image_folders:
            return base
        for name in self.image_folders:
            if (base / name / self.image_mark).is_dir():
                return base / name
        return base if options.images else base / self.image_folders[0]

    def layout(self, options: DataOptions) -> str:
        """Return where the pictures are expected, and what to do without them."""
        if not self.image_folders:
            return "its facts have no pictures"
        return (
            f"expected as {self.images(options) / self.image_example}; --images FOLDER names another place, "
            "--skip-missing goes on with what is there"
        )

    def form(self, split: str) -> str:
        """Return the keys of a record of a split."""
        keys = [*_TEXTS, *_IMAGES]
        if split in self.more_keys:
            keys.append(self.more_keys[split])
        if split in self.own_keys:
            keys = [self.own_keys[split]]
        listed = ", ".join(keys)
        return f"a record of {self.name}:{split} is an object with {listed}"

    def _files(self) -> str:
        return ", ".join(dict.fromkeys(source.file for source in self.sources.values()))

    # -- audit --------------------------------------------------------------------------------------------------------

    def check(self, split: str, options: DataOptions) -> Iterator[Finding]:
        """Count and compare, find what leaks from training to evaluation, and write the clean lists."""
        root = self.root(options)
        splits: dict[str, list[EditCase]] = {}
        as_written = replace(options, template="verbatim")
        for name in dict.fromkeys((TRAIN, split)) if split else self._distinct():
            source = self.sources[name]
            yield from self._check_file(f"{name} file", source, root)
            if (root / source.file).is_file():
                problems: list[str] = []
                splits[name] = list(self.cases(name, as_written, problems))
                for problem in problems:
                    yield f"{name} record", False, problem
        for source in self.extras:
            yield from self._check_file("locality file", source, root)
        for name, cases in splits.items():
            yield from audit.labelled(f"{name} ", audit.within(cases))
        for name, cases in splits.items():
            if name != TRAIN and TRAIN in splits:
                train = splits[TRAIN]
                label = f"leak {TRAIN}-{name}: "
                yield from audit.labelled(label, audit.shared(train, cases))
                clean = audit.clean(train, cases)
                yield self._write_clean(name, clean, len(cases), options)
        wanted = []
        for name, cases in splits.items():
            if split in ("", name):
                wanted.extend(cases)
        yield from audit.pictures(
            wanted,
            skip=options.skip_missing,
            layout=self.layout(options),
        )

    def _distinct(self) -> list[str]:
        """Return the splits; of those that read the same file, the first."""
        first: dict[str, str] = {}
        for name, source in self.sources.items():
            first.setdefault(source.file, name)
        return list(first.values())

    def _check_file(
        self, label: str, source: AnnotationFile, root: Path
    ) -> Iterator[Finding]:
        path = root / source.file
        if not path.is_file():
            yield label, None, f"{source.file} is not there"
            return
        problems: list[str] = []
        count = _count(path, source.key, problems)
        try:
            digest = digest_of(path, limit=LARGEST_DATA)
        except DataError as error:
            for problem in error.problems:
                yield label, False, problem
            return
        same = None
        verdict = "no checksum is known"
        if source.sha256:
            same = digest == source.sha256
            verdict = "the published copy"
            if not same:
                verdict = f"not the published copy, which has {source.records:,}"
        counted = f"{source.file}: {count:,} records"
        yield label, same, f"{counted}, {verdict} (sha256 {digest[:12]}...)"
        for problem in problems:
            yield label, False, problem

    # -- the list of clean cases --------------------------------------------------------------------------------------

    def subset(self, split: str, options: DataOptions) -> Path:
        """Return the clean list that `mmedit doctor` wrote for just these files; raise DataError if there is none."""
        path = self._clean_file(split, options)
        if not path.is_file():
            command = f"mmedit doctor {self.name}:{split}"
            if options.root:
                command += f" --root {options.root}"
            raise DataError(
                f"--subset {CLEAN}: no list for these files of {self.name}:{split} yet",
                f"`{command}` writes it",
            )
        return path

    def _clean_file(self, split: str, options: DataOptions) -> Path:
        if split == TRAIN:
            raise DataError(
                f"--subset {CLEAN}: is for evaluation, not for {self.name}:{TRAIN}"
            )
        digests = []
        for name in (TRAIN, split):
            path = self.file(name, options)
            digests.append(digest_of(path, limit=LARGEST_DATA))
        digest = sha256_json(digests)[:12]
        return cache_dir() / "subsets" / f"{self.name}-{split}-{CLEAN}-{digest}.json"

    def _write_clean(
        self, split: str, clean: Mapping[str, list[str]], of: int, options: DataOptions
    ) -> Finding:
        path = self._clean_file(split, options)
        path.parent.mkdir(parents=True, exist_ok=True)
        head = {
            "data": f"{self.name}:{split}",
            "about": audit.CLEAN_RULES,
            "cases": clean,
        }
        write_atomic(path, json.dumps(head, indent=1) + "\n")
        left_out = Counter(chain.from_iterable(clean.values()))
        found = f"{len(clean):,} of {of:,} cases"
        for column, count in left_out.items():
            found += f", {count:,} without {audit.label(column)}"
        return f"{split} clean list", True, f"{found}: {path}"


def _count(path: Path, key: str, problems: list[str]) -> int:
    """Return the number of records in a file: an array, or an object of columns."""
    if not key:
        return sum(1 for _ in read_records(path, problems))
    try:
        found = read_json_object(path).values.get(key)
    except DataError as error:
        problems += error.problems
        return 0
    if not isinstance(found, list | dict):
        problems.append(f"{path}: {key}: must be a list of records")
        return 0
    return len(found)
