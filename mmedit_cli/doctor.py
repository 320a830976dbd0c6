"""Is this installation sound, and are these data usable? Every finding is one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from mmedit_cli import installation
from mmedit_cli.errors import DataError
from mmedit_cli.output import Output

if TYPE_CHECKING:
    from mmedit_cli.knowledge.data.base import DataOptions
    from mmedit_cli.knowledge.data.shared.audit import Finding

_MARKS = {True: "ok", False: "PROBLEM", None: "note"}


def run(out: Output, findings: Iterable[Finding] = ()) -> bool:
    """Check the installation, print that and the `findings` about data; return whether all is well."""
    found = []
    rows = []
    well = True
    for name, ok, text in [*installation.check(), *findings]:
        found.append({"check": name, "ok": ok, "found": text})
        rows.append([_MARKS[ok], name, text])
        well = well and ok is not False

    def show() -> None:
        out.table(["", "check", "found"], rows)

    out.result(found, show)
    return well


def check_model(name: str) -> Iterator[Finding]:
    """Load a model that answers, and compare it with its own processor and `generate` once more.

    Raises ModelError if it cannot be loaded.
    """
    from mmedit_cli.catalog import find_model
    from mmedit_cli.knowledge.models.shared.loading import open_unchecked
    from mmedit_cli.knowledge.models.shared.self_check import FAST, ensure_checked

    backbone = open_unchecked(find_model(name))
    kind = type(backbone.model).__name__
    yield "model", True, f"{kind}, family {backbone.family}"
    found = ensure_checked(backbone, again=True)
    for check in found.checks:
        slow_only = check.name == FAST and not found.failed
        ok = None if slow_only and check.ok is False else check.ok
        yield check.name, ok, check.found
    if found.failed:
        yield "usable", False, "no: it does not answer here as it does by itself"
    elif not found.fast:
        yield (
            "usable",
            True,
            "yes, with whole forward passes in the place of single layers",
        )


def check_subjects(data: str, options: DataOptions) -> Iterator[Finding]:
    """Open the photos of every subject of a set."""
    from mmedit_cli.drawing.data.opening import open_subjects
    from mmedit_cli.drawing.methods.base import check_concept

    subjects = open_subjects(data, root=options.root).subjects
    names = ", ".join(subject.name for subject in subjects)
    photos = sum(len(subject.concept.images) for subject in subjects)
    yield "subjects", True, f"{len(subjects)}: {names}"
    yield "photos", True, str(photos)
    for subject in subjects:
        try:
            check_concept(subject.concept)
        except DataError as error:
            yield from (("problem", False, problem) for problem in error.problems)


def check_facts(data: str, options: DataOptions) -> Iterator[Finding]:
    """Count the facts about drawings of a set by kind, and their prompts; look for what two of them say."""
    from mmedit_cli.drawing.data.opening_facts import open_facts

    found = open_facts(data, root=options.root)
    for kind, count in Counter(fact.kind for fact in found.facts).items():
        yield f"facts {kind}", True, f"{count:,}"
    prompts = {probe.prompt for probe in found.probes()}
    yield "prompts", True, f"{len(prompts):,}"
    edited = Counter((fact.kind, fact.change.source) for fact in found.facts)
    for (kind, source), count in edited.items():
        if count > 1:
            yield "note", None, f"{kind}: {source!r} is edited {count} times"


def check_pairs(data: str, options: DataOptions) -> Iterator[Finding]:
    """Count the edit pairs of a set by kind, and open the first pair of each."""
    from mmedit_cli.picture_editing.data.opening import open_pairs

    pairs = open_pairs(data)[1]
    for kind, count in sorted(Counter(pair.kind for pair in pairs).items()):
        yield f"pairs {kind}", True, f"{count:,}"
    first_of_kind = {pair.kind: pair for pair in reversed(pairs)}
    for pair in first_of_kind.values():
        try:
            pair.source()
            pair.target()
        except DataError as error:
            for problem in error.problems:
                yield "problem", False, f"{pair.place}: {problem}"


def check_cases(data: str, options: DataOptions) -> Iterator[Finding]:
    """Audit the cases of a data set, folder or file, and open their pictures."""
    from mmedit_cli.knowledge.data.base import (
        find_dataset,
        not_read,
        own_cases,
        own_file,
    )
    from mmedit_cli.knowledge.data.shared import audit

    named = find_dataset(data)
    if named is not None:
        dataset, split = named
        yield from dataset.check(dataset.split(split) if split else "", options)
        return
    problems: list[str] = []
    path = own_file(data)
    ignored: list[str] = []
    cases = list(own_cases(path, options, problems, ignored))
    yield from (("records", False, problem) for problem in problems)
    if ignored:
        yield "columns", None, not_read(ignored)
    if cases:
        layout = f"named relative to {path.parent}"
        yield from audit.within(cases)
        yield from audit.pictures(cases, skip=options.skip_missing, layout=layout)
    elif not problems:
        yield "cases", False, f"{path}: no cases in it"
