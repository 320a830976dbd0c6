"""Is this installation sound, and are these data usable? Every finding is one line."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections import Counter
from collections.abc import Iterator
from typing import Any

from mmedit_cli import runtime
from mmedit_cli.errors import DataError
from mmedit_cli.output import Output


def run(out: Output, data: str | None) -> bool:
    """Print what was checked; return whether all is well."""
    rows = [*_installation(), *(_data(data) if data is not None else ())]
    marks = {True: "ok", False: "PROBLEM"}
    out.result(
        [{"check": name, "ok": ok, "found": found} for name, ok, found in rows],
        lambda: out.table(["", "check", "found"], [[marks[ok], name, found] for name, ok, found in rows]),
    )
    return all(ok for _, ok, _ in rows)


def _installation() -> Iterator[tuple[str, bool, str]]:
    versions = runtime.versions()
    for package in runtime.PACKAGES:
        yield package, package in versions, versions.get(package, "not installed")
    yield "torchvision", *_torchvision()
    try:
        device = runtime.resolve_device("auto")
        facts = runtime.environment(device)
        yield "device", True, f"{facts['device']} ({facts['device_name']}), {facts['threads']} threads"
    except ImportError as error:
        yield "device", False, f"torch cannot be imported: {error}"


def _torchvision() -> tuple[bool, str]:
    """torchvision is not needed; one that does not match torch makes every image processor fail."""
    if importlib.util.find_spec("torchvision") is None:
        return True, "not installed, not needed"
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # a broken binary raises whatever it likes
        return False, f"installed but broken ({error}): pip uninstall torchvision"
    return True, importlib.metadata.version("torchvision")


def _data(data: str) -> Iterator[tuple[str, bool, str]]:
    from mmedit_cli.datasets.base import find_dataset, load_cases
    from mmedit_cli.pictures import check_picture

    dataset = find_dataset(data)
    if dataset is not None:
        yield from _audit(dataset.audit(dataset.folder))
        return
    try:
        cases = load_cases(data)
    except DataError as error:
        yield from (("records", False, problem) for problem in error.problems)
        return
    yield "cases", True, str(len(cases))
    counts: Counter[str] = Counter()
    images: dict[Any, str] = {}
    for case in cases:
        for column, queries in case.columns():
            counts[column] += len(queries)
            images.update((q.image, case.place) for q in queries if q.image is not None and q.image not in images)
    for column, count in counts.items():
        yield column, True, f"{count} queries"
    bad = 0
    for image, place in images.items():
        try:
            check_picture(image)
        except DataError as error:
            bad += 1
            yield "image", False, f"{place}: {error}"
    yield "images", not bad, f"{len(images)} distinct, {bad} unusable"


def _audit(found: dict[str, Any]) -> Iterator[tuple[str, bool, str]]:
    """Turn the audit of a named data set into rows: counts, leaks between splits, licences, and every problem."""
    for key in ("concepts", "flags", "pictures"):
        yield key, True, f"{found[key]:,}"
    for split, counts in found["splits"].items():
        types = ", ".join(f"{name} {count}" for name, count in counts["types"].items())
        yield f"{split} cases", True, f"{counts['cases']:,}: {types}"
    for pair, shared in found["leaks"].items():
        total = sum(map(len, shared.values()))
        yield f"leaks {pair}", not total, ", ".join(f"{sort} {len(items)}" for sort, items in shared.items())
    for source, licence in found["licences"].items():
        yield f"licence {source}", True, licence
    yield from (("problem", False, problem) for problem in found["problems"])
