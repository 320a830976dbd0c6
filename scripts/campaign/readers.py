"""Let readers open ledgers of edits while a writer adds, undoes, brings back and compacts; count those that fail.

    python scripts/campaign/readers.py                  # 200 readers, four at a time, about two minutes on two cores
    python scripts/campaign/readers.py --readers 1000

There are two ledgers: of an editor whose edits hang together (`ft`: each edit replaces the tensors of all) and of one
whose edits are independent (`multi-melo`). Each has a writer of its own that never rests. Of 40 readers one is a
process of its own (`mmedit ask --edits`), ten load the model with the edits and ask it, and the others read edits and
tensors together. What they found is compared with all states that the writer left behind: anything between two states
is a failure. Exit code 1 if a reader fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# before anything imports torch
os.environ.update(
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    COLUMNS="120",
)

ROOT = Path(__file__).resolve().parents[2]
STAR = ROOT / "tests" / "data" / "shapes" / "solid" / "red-star.png"
EDITORS = ("ft", "multi-melo")
QUESTION = "What is this?"
MOST_EDITS = 6
FORK = multiprocessing.get_context("fork")  # what is imported is imported once


@dataclass(frozen=True)
class Reading:
    """What one reader found: the ids of the active edits and a digest of their tensors, or why it failed."""

    kind: str
    ledger: str
    ids: tuple[int, ...] = ()
    digest: str = ""
    failure: str = ""
    seconds: float = 0.0


def digest_of(tensors: dict[str, Any]) -> str:
    """Return a digest of tensors by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# -- the writer ---------------------------------------------------------------------------------------------------


def begin(folder: Path, states: Path) -> None:
    """Begin a ledger with two edits, of the editor that the folder is named after."""
    from mmedit_cli import EditOptions, ModelOptions, Query, begin_edits

    overrides = ("steps=2",)
    options = EditOptions(
        folder.name, ModelOptions("tiny-blip2", "cpu"), overrides=overrides
    )
    with begin_edits(folder, options) as model:
        model.edit(
            [Query(QUESTION, "a star", STAR), Query("What colour is it?", "red", STAR)],
            batch=1,
        )
        note_state(folder, states)


def write_until(folder: Path, stop: Path, states: Path) -> None:
    """Change a ledger again and again until a file is there; note every state that it is left in."""
    from mmedit_cli import ModelOptions, Query, open_edits
    from mmedit_cli.knowledge.workflow.editing import change_edits, compact
    from mmedit_cli.output import Output

    here, out = ModelOptions("", "cpu"), Output(quiet=True)
    while not stop.exists():
        with open_edits(folder, model=here, writing=True) as model:
            number = len(model.ledger.edits) + 1
            if number <= MOST_EDITS:
                model.edit(
                    [Query(f"What is number {number}?", f"thing {number}", STAR)]
                )
                note_state(folder, states)
            last = model.ledger.active[-1].id
            model.undo([last])
            note_state(folder, states)
            model.redo([last])
            note_state(folder, states)
        compact(folder, False, here, out)
        note_state(folder, states)
        for do in ("undo", "redo"):
            change_edits(folder, do, "1", here, out)
            note_state(folder, states)


def note_state(folder: Path, states: Path) -> None:
    """Append the state of a ledger to a file; the writer calls it, so nobody changes the ledger meanwhile."""
    found = read_ledger(folder)
    with states.open("a") as file:
        file.write(json.dumps([found.ids, found.digest]) + "\n")


# -- the readers --------------------------------------------------------------------------------------------------


def read_ledger(folder: Path) -> Reading:
    """Read the edits and their tensors together."""
    from mmedit_cli.knowledge.ledger.ledger import Ledger

    with Ledger.open(folder, tensors=True) as ledger:
        ids = tuple(edit.id for edit in ledger.active)
        return Reading("ledger", folder.name, ids, digest_of(ledger.tensors()))


def ask_model(folder: Path) -> Reading:
    """Load the model with the edits and ask it."""
    from mmedit_cli import ModelOptions, Query, open_edits

    with open_edits(folder, model=ModelOptions("", "cpu")) as model:
        model.generate([Query(QUESTION, image=STAR)], max_new_tokens=2)
        return Reading(
            "model", folder.name, tuple(edit.id for edit in model.ledger.active)
        )


def ask_process(folder: Path) -> Reading:
    """Ask in a process of its own, as a user does."""
    command = [
        sys.executable,
        "-m",
        "mmedit_cli",
        "ask",
        "--edits",
        folder,
        "--image",
        STAR,
        QUESTION,
    ]
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    failure = (
        "" if done.returncode == 0 else f"exit {done.returncode}: {done.stderr.strip()}"
    )
    return Reading("process", folder.name, failure=failure)


def read(kind: str, folder: Path) -> Reading:
    """Be one reader; whatever goes wrong is its failure."""
    started = time.perf_counter()
    try:
        reader = {"ledger": read_ledger, "model": ask_model, "process": ask_process}[
            kind
        ]
        found = reader(folder)
    except Exception as error:
        found = Reading(kind, folder.name, failure=f"{type(error).__name__}: {error}")
    return Reading(
        kind,
        found.ledger,
        found.ids,
        found.digest,
        found.failure,
        time.perf_counter() - started,
    )


def readers(count: int, folders: list[Path]) -> Iterator[tuple[str, Path]]:
    """Yield the kind and the ledger of each reader."""
    for number in range(count):
        kind = (
            "process" if number % 40 == 20 else "model" if number % 4 == 1 else "ledger"
        )
        yield kind, folders[number // 2 % len(folders)]


def run(count: int, at_once: int, root: Path) -> tuple[list[Reading], list[str], int]:
    """Return what the readers found, the failures in words, and how many changes the writers made."""
    folders = [root / editor for editor in EDITORS]
    stop, states = (
        root / "stop",
        {folder.name: root / f"{folder.name}.states" for folder in folders},
    )
    with FORK.Pool(1) as pool:
        for folder in folders:
            pool.apply(begin, (folder, states[folder.name]))
    writers = [
        FORK.Process(target=write_until, args=(f, stop, states[f.name]))
        for f in folders
    ]
    for writer in writers:
        writer.start()  # before this process has threads: a forked process would inherit their locks
    with FORK.Pool(at_once) as pool, ThreadPoolExecutor(at_once) as threads:
        todo = [
            threads.submit(pool.apply, read, job) for job in readers(count, folders)
        ]
        found = [one.result() for one in todo]
    stop.touch()
    for writer in writers:
        writer.join(300)
        writer.kill()
    failures = [
        f"{reading.kind} on {reading.ledger}: {reading.failure}"
        for reading in found
        if reading.failure
    ]
    for folder, writer in zip(folders, writers, strict=True):
        if writer.exitcode:
            failures.append(f"the writer of {folder.name} ended with {writer.exitcode}")
    changes = 0
    for name, file in states.items():
        left = [json.loads(line) for line in file.read_text().splitlines()]
        changes += len(left) - 1
        failures += strange(
            [reading for reading in found if reading.ledger == name], left
        )
    return found, failures, changes


def strange(found: list[Reading], left: list[Any]) -> list[str]:
    """Return in a line each which readers of a ledger found what its writer did not leave behind."""
    states = {(tuple(ids), digest) for ids, digest in left}
    actives = {ids for ids, _ in states}
    lines = []
    for reading in found:
        if reading.failure or reading.kind == "process":
            continue
        whole = (
            (reading.ids, reading.digest) in states
            if reading.digest
            else reading.ids in actives
        )
        if not whole:
            lines.append(
                f"{reading.kind} on {reading.ledger}: no writer left edits {reading.ids} so"
            )
    return lines


def import_all() -> None:
    """Import what is heavy, by using a model once, so that forked processes need not."""
    import torch

    torch.set_num_threads(1)
    from mmedit_cli import Query, registry
    from mmedit_cli.knowledge.models.shared.loading import load_backbone
    from mmedit_cli.knowledge.workflow import editing, repairing  # noqa: F401

    load_backbone("tiny-blip2", device="cpu").generate(
        [Query(QUESTION, image=STAR)], max_new_tokens=1
    )
    for editor in EDITORS:
        registry.editors.get(editor)


def main() -> int:
    """Run the campaign, print its figures, and return 1 if a reader failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--readers", type=int, default=200)
    parser.add_argument(
        "--at-once", type=int, default=4, help="how many read at the same time"
    )
    options = parser.parse_args()
    sys.dont_write_bytecode = True
    import_all()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mmedit-readers-") as root:
        found, failures, changes = run(options.readers, options.at_once, Path(root))
    kinds = Counter(reading.kind for reading in found)
    print(
        f"{'readers':10}{'number':>8}{'states seen':>13}{'median s':>10}{'failures':>10}"
    )
    for kind, number in kinds.items():
        of_kind = [reading for reading in found if reading.kind == kind]
        seen = len(
            {(reading.ledger, reading.ids, reading.digest) for reading in of_kind}
        )
        median = sorted(reading.seconds for reading in of_kind)[number // 2]
        failed = sum(line.startswith(f"{kind} on") for line in failures)
        print(
            f"{kind:10}{number:8}{seen if kind != 'process' else '-':>13}{median:10.2f}{failed:10}"
        )
    print(
        f"{len(failures)} failures in {len(found)} readers beside {changes} changes of two writers, "
        f"{time.perf_counter() - started:.0f} s"
    )
    for line in failures:
        print(f"  {line}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
