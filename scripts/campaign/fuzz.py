"""Give hostile files to every reader and count what goes wrong.

    python scripts/campaign/fuzz.py                 # about 1,700 inputs
    python scripts/campaign/fuzz.py --count 5 -v    # five for each reader, each told

Each input is a folder of valid files of which one is changed: a value of a JSON, a key, bytes, or the file is replaced
by a FIFO, a device, a folder, a bomb. A reader is a command, or the function a command reads with; what it raises is
turned into an exit code as `mmedit` does it. Counted are exceptions that nobody expected ("please report it"), inputs
that take over 20 seconds, files outside the folder that are touched, and the most memory above what the idle program
takes. Everything runs in this process; the same --seed gives the same inputs. Exit code 1 if anything is counted.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    COLUMNS="120",
)
sys.path[:0] = [
    str(Path(__file__).resolve().parents[2]),
    str(Path(__file__).resolve().parent),
]

from inputs import changed_bytes, changed_json, put_strange_file  # noqa: E402
from readers_to_fuzz import Reader, import_all, readers  # noqa: E402

SECONDS = 20.0
MOST_MEMORY = 512 << 20


class TooSlow(BaseException):
    """An input took more than SECONDS."""


@dataclass
class Counts:
    """What a campaign found; `failures` says of which input and what happened."""

    inputs: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    uncaught: int = 0
    slow: int = 0
    outside: int = 0
    peak: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether nothing went wrong."""
        return (
            not (self.uncaught or self.slow or self.outside) and self.peak < MOST_MEMORY
        )


def fuzz(
    count: int, seed: int, root: Path, chosen: list[Reader], *, verbose: bool = False
) -> Counts:
    """Give `count` inputs to each reader."""
    counts = Counts()
    canary = root / "canary"
    canary.mkdir()
    (canary / "victim.txt").write_text("still here")
    (canary / "pictures").mkdir()
    (canary / "pictures" / "mine.png").write_bytes(b"mine")
    untouched = _state(canary)
    for reader in chosen:
        valid = root / "valid" / reader.name
        valid.mkdir(parents=True)
        reader.make(valid)
        undamaged = (
            Counts()
        )  # this also imports what is needed, before memory is measured
        told = _run(reader, valid, undamaged)
        if undamaged.refused or undamaged.uncaught or undamaged.slow:
            counts.failures.append(f"{reader.name} refuses what is valid: {told}")
            counts.uncaught += 1
        idle = _memory("VmRSS")
        for number in range(count):
            chance = random.Random(f"{seed}/{reader.name}/{number}")
            folder = root / "work" / "inside"
            shutil.copytree(valid, folder, symlinks=True)
            what = _damage(folder, chance, number)
            _reset_peak()
            before = counts.uncaught + counts.slow
            told = _run(reader, folder, counts)
            above = max(0, _memory("VmHWM") - idle)
            place = f"{reader.name} {number} ({what})"
            if counts.uncaught + counts.slow > before:
                counts.failures.append(f"{place}: {told}")
            if above > MOST_MEMORY:
                counts.failures.append(f"{place}: {above >> 20} MiB")
            if _state(canary) != untouched:
                counts.outside += 1
                counts.failures.append(f"{place}: touched a file outside")
                untouched = _state(canary)
            counts.peak = max(counts.peak, above)
            counts.inputs[reader.name] += 1
            if verbose:
                print(
                    f"{place}: {told.strip().splitlines()[0] if told.strip() else 'done'}"
                )
            shutil.rmtree(root / "work")
    return counts


def _damage(folder: Path, chance: random.Random, number: int) -> str:
    """Change one file of a folder; return which and how."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = chance.choice(files)
    name = path.relative_to(folder).as_posix()
    if number % 5 == 0:
        return f"{name}: {put_strange_file(path, chance)}"
    data = path.read_bytes()
    if number % 5 == 1 or path.suffix not in (".json", ".jsonl", ".yaml"):
        path.write_bytes(changed_bytes(data, chance))
        return f"{name}: bytes"
    path.write_text(_changed_text(path, data.decode(), chance))
    return f"{name}: values"


def _changed_text(path: Path, text: str, chance: random.Random) -> str:
    import json

    import yaml

    if path.suffix != ".jsonl":
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        return changed_json(value, chance)  # JSON is YAML, too
    lines = text.splitlines()
    which = chance.randrange(len(lines))
    lines[which] = changed_json(json.loads(lines[which]), chance)
    return "\n".join(lines) + "\n"


def _run(reader: Reader, folder: Path, counts: Counts) -> str:
    """Give a folder to a reader; return what it said, or the traceback of what nobody expected."""
    from mmedit_cli.errors import MmeditError

    try:
        with _quiet() as said, _limited():
            code = reader.read(folder)
        text = said.getvalue()
        if "please report it" in text or "Traceback" in text:
            counts.uncaught += 1
        elif code:
            counts.refused += 1
        return text
    except (MmeditError, OSError) as error:
        counts.refused += 1
        return str(error)
    except TooSlow:
        counts.slow += 1
        return f"over {SECONDS:.0f} seconds"
    except Exception:
        counts.uncaught += 1
        return traceback.format_exc()


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    left, _ = signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(
        3 * SECONDS, exit=True, file=sys.__stderr__
    )  # C code heeds no alarm
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, before)


def _state(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        digest.update(
            f"{path}:{status.st_mode}:{status.st_mtime_ns}:".encode() + content
        )
    return digest.hexdigest()


def _reset_peak() -> None:
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _memory(key: str) -> int:
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key):
                return int(line.split()[1]) << 10
    return 0


def main() -> int:
    """Run the campaign, print its figures, and return 1 if anything went wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="the readers (default: all)")
    parser.add_argument(
        "--count", type=int, default=100, help="inputs for each reader (default: 100)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="tell of every input"
    )
    options = parser.parse_args()
    known = {reader.name: reader for reader in readers()}
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"{unknown[0]}: there are {', '.join(known)}")
    chosen = [known[name] for name in options.names] or list(known.values())
    import_all()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mmedit-fuzz-") as root:
        counts = fuzz(
            options.count,
            options.seed,
            Path(root).resolve(),
            chosen,
            verbose=options.verbose,
        )
    for failure in counts.failures:
        print(failure)
    print(
        f"inputs               {counts.inputs.total():,} over {len(counts.inputs)} readers"
    )
    print(f"refused              {counts.refused:,}")
    print(f"uncaught exceptions  {counts.uncaught}")
    print(f"over {SECONDS:.0f} seconds      {counts.slow}")
    print(f"touched outside      {counts.outside}")
    print(f"peak memory          {counts.peak >> 20} MiB above idle")
    print(f"time                 {time.monotonic() - began:.0f} s")
    return 0 if counts.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
