"""Download from a web server that misbehaves at random, and count what becomes of it.

    python scripts/campaign/website.py                 # 300 downloads
    python scripts/campaign/website.py --runs 1000 --seed 7

Each run is one file and a queue of up to four random faults (cut, stalled, dripping and endless bodies, lying ranges,
wrong lengths and encodings, redirects, refusals, garbage), with or without a size that is expected; every third run is
interrupted and given again. A run is right if it ends with the file or with an error in one line and no file. Only a
server that sends other bytes of the right length cannot be found out without a digest; no fault here does that.
Prints a table; exit code 1 if a run is wrong or takes more than 20 seconds.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from download.website import CHUNKED, CONTENT, Site, serve

from mmedit_cli import web
from mmedit_cli.download.transfer import Manners, Transfer, TransferError, client
from mmedit_cli.web import Pace

SIZE = len(CONTENT)
MANNERS = Manners(
    tries=3,
    backoff=0.01,
    longest_wait=1,
    timeout=0.3,
    pace=Pace(seconds=0.3, answer=0.6),
)
LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % SIZE
FAULTS: dict[str, tuple[Any, ...]] = {
    "cut": ("cut", 30_000),
    "cut at once": ("cut", 0),
    "nothing": ("raw", b""),
    "no HTTP": ("raw", b"\x16\x03\x01garbage\r\n\r\n"),
    "hang": ("hang",),
    "dripping headers": ("drip", b"HTTP/1.1 200 OK\r\nX: "),
    "dripping body": ("drip", LENGTH),
    "endless": ("endless", CHUNKED),
    "416": ("status", 416, {"Content-Range": f"bytes */{SIZE}"}),
    "206 without a range": ("status", 206),
    "range from 0": ("headers", {"Content-Range": f"bytes 0-{SIZE - 1}/{SIZE}"}),
    "range of another total": (
        "headers",
        {"Content-Range": f"bytes 30000-{SIZE}/{SIZE + 1}"},
    ),
    "gzip": ("headers", {"Content-Encoding": "gzip"}),
    "too long a length": ("headers", {"Content-Length": str(SIZE + 1)}),
    "a length of 17 digits": ("headers", {"Content-Length": "9" * 17}),
    "a page": ("headers", {"Content-Type": "text/html"}),
    "redirect to nowhere": ("status", 302),
    "redirect in a circle": ("status", 302, {"Location": "/file"}),
    "busy": ("status", 503, {"Retry-After": "0"}),
    "forbidden": ("status", 403),
    "none": ("none",),
}


def attempt(site: Site, target: Path, size: int | None, stop_after: int | None) -> str:
    """Download once; return what became of it. `stop_after`: bytes after which the user interrupts."""
    came = 0

    def tick(what: str, count: int, total: int | None) -> None:
        nonlocal came
        came += count
        if stop_after is not None and came > stop_after:
            raise KeyboardInterrupt

    try:
        with client(MANNERS) as session:
            Transfer(session, f"{site.url}/file", target, size, MANNERS, tick).run()
    except TransferError as error:
        return "wrong: two lines" if "\n" in str(error) else "refused"
    except KeyboardInterrupt:
        return "interrupted"
    except Exception as error:  # this is what is sought
        return f"wrong: {type(error).__name__}: {error}"
    return "file"


def run(
    site: Site, folder: Path, chance: random.Random, number: int
) -> tuple[list[str], str]:
    """Do one run; return the names of its faults and what became of it."""
    names = chance.choices(list(FAULTS), k=chance.randint(1, 4))
    site.files["/file"] = CONTENT
    site.faults["/file"] = [FAULTS[name] for name in names]
    size = chance.choice([SIZE, None])
    target = folder / str(number)
    found = attempt(
        site, target, size, chance.randrange(SIZE) if number % 3 == 0 else None
    )
    if found == "interrupted":
        found = attempt(site, target, size, None)
    if found == "file" and target.read_bytes() != CONTENT:
        return names, "wrong: other bytes"
    if found == "refused" and target.exists():
        return names, "wrong: a file was left"
    return names, found


def main() -> int:
    """Run the campaign and return 1 if anything went wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    web._UNSTATED_BODY = (
        16 << 20
    )  # an endless body that nobody knows the size of would take a GiB of the disk
    chance = random.Random(options.seed)
    ends: Counter[str] = Counter()
    slowest, wrong = 0.0, []
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory(prefix="mmedit-website-") as name, serve() as site:
        for number in range(options.runs):
            start = time.monotonic()
            names, found = run(site, Path(name), chance, number)
            seconds = time.monotonic() - start
            slowest = max(slowest, seconds)
            ends[found.partition(":")[0]] += 1
            if found.startswith("wrong") or seconds > 20:
                wrong.append(
                    f"run {number}: {', '.join(names)}: {found}, {seconds:.1f} s"
                )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{options.runs} downloads, seed {options.seed}: "
        + ", ".join(f"{n} {end}" for end, n in sorted(ends.items()))
    )
    print(
        f"slowest {slowest:.1f} s, peak {(peak - idle) / 1024:.0f} MiB above idle, {len(wrong)} wrong"
    )
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
