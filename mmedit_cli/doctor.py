"""Is this installation sound, and are these data usable? Every finding is one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmedit_cli import installation
from mmedit_cli.errors import DataError
from mmedit_cli.output import Output

if TYPE_CHECKING:
    from mmedit_cli.drawing.data.base import SubjectSet
    from mmedit_cli.knowledge.data.base import DataOptions, Finding
    from mmedit_cli.picture_editing.data.base import EditPair


def run(out: Output, data: str | None, options: DataOptions) -> bool:
    """Print what was checked; return whether all is well."""
    rows = list(installation.check())
    if data is not None:
        out.note(f"checking {data}: every picture is opened, which may take a while")
        rows += _data(data, options)
    marks = {True: "ok", False: "PROBLEM", None: "note"}
    out.result(
        [{"check": name, "ok": ok, "found": found} for name, ok, found in rows],
        lambda: out.table(
            ["", "check", "found"],
            [[marks[ok], name, found] for name, ok, found in rows],
        ),
    )
    return all(ok is not False for _, ok, _ in rows)


def _subjects(found: SubjectSet) -> Iterator[Finding]:
    """Open the photos of every subject."""
    from mmedit_cli.drawing.methods.base import check_concept

    yield (
        "subjects",
        True,
        f"{len(found.subjects)}: {', '.join(subject.name for subject in found.subjects)}",
    )
    yield (
        "photos",
        True,
        str(sum(len(subject.concept.images) for subject in found.subjects)),
    )
    for subject in found.subjects:
        try:
            check_concept(subject.concept)
        except DataError as error:
            yield from (("problem", False, problem) for problem in error.problems)


def _pairs(pairs: Sequence[EditPair]) -> Iterator[Finding]:
    """Count edit pairs by kind, and compose the first of each."""
    for kind, count in sorted(Counter(pair.kind for pair in pairs).items()):
        yield f"pairs {kind}", True, f"{count:,}"
    for pair in {pair.kind: pair for pair in reversed(pairs)}.values():
        try:
            pair.source(), pair.target()
        except DataError as error:
            yield from (
                ("problem", False, f"{pair.place}: {problem}")
                for problem in error.problems
            )


def _data(data: str, options: DataOptions) -> Iterator[Finding]:
    from mmedit_cli.drawing.data import opening as subjects
    from mmedit_cli.knowledge.data.base import find_dataset, own_cases, own_file
    from mmedit_cli.knowledge.data.shared import audit
    from mmedit_cli.picture_editing.data import opening as edit_pairs

    if data in subjects.NAMED or (Path(data) / "subjects.yaml").is_file():
        yield from _subjects(subjects.open_subjects(data, root=options.root))
        return
    if data.partition(":")[0] in edit_pairs.NAMED:
        yield from _pairs(edit_pairs.open_pairs(data)[1])
        return
    named = find_dataset(data)
    if named is not None:
        dataset, split = named
        yield from dataset.check(dataset.split(split) if split else "", options)
        return
    path, problems = own_file(data), []
    cases = list(own_cases(path, options, problems))
    yield from (("records", False, problem) for problem in problems)
    if cases:
        yield from audit.within(cases)
        yield from audit.pictures(
            cases, skip=options.skip_missing, layout=f"named relative to {path.parent}"
        )
    elif not problems:
        yield "cases", False, f"{path}: no cases in it"
