"""Kill each kind of command at every change that it makes to the file system, repeat it, and compare the ends.

    python scripts/campaign/kill.py                        # all commands, on tiny models
    python scripts/campaign/kill.py --short                # one of each kind that takes seconds
    python scripts/campaign/kill.py image-edit-batch -v    # one command, each kill told

For each command: it runs once undisturbed, which gives the wanted end and the number of its changes. Then, for each
change, it begins anew from the same start and is killed (SIGKILL) just before that change; a write is also cut in
half. The same command is given again (or what is documented to continue it), and the folder is compared with the
wanted end: every file, its mode and every folder, so that no temporary file is left. Only declared costs and times
may differ.
Kills that leave the same files behind are continued once. Every process is forked from one that has imported what the
command imports. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# before anything imports torch
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", COLUMNS="120")
os.environ.pop(
    "HF_HUB_OFFLINE", None
)  # the downloads are from a server on this machine

from changes import Watch
from commands_to_kill import scenarios, website
from kills import Campaign, Result


@contextmanager
def campaign(copies: bool) -> Iterator[Campaign]:
    """Yield a campaign in a temporary folder, with the hooks in place."""
    sys.dont_write_bytecode = True
    watch = Watch()
    watch.install()
    from mmedit_cli import app, registry
    from mmedit_cli.knowledge import training_loop
    from mmedit_cli.knowledge.evaluation import protocol

    for module in (protocol, training_loop):
        module.SAVE_SECONDS = (
            0.0  # states are saved at every chance, however fast the machine is
        )
    registry.emojikb_dir()  # unpacked now, or every command would do so outside its folder
    with website(), tempfile.TemporaryDirectory(prefix="mmedit-kill-") as root:
        yield Campaign(Path(root).resolve(), watch, app.main, copies=copies)


def main() -> int:
    """Run the scenarios that are named, print a line each, and return 1 if anything differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="the commands to kill (default: all)")
    parser.add_argument(
        "--short", action="store_true", help="those whose campaign takes seconds"
    )
    parser.add_argument(
        "--copies",
        action="store_true",
        help="copy the folder before each change instead of killing",
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="tell of every kill"
    )
    parser.add_argument(
        "--list", action="store_true", help="list the commands and stop"
    )
    options = parser.parse_args()
    known = {scenario.name: scenario for scenario in scenarios()}
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"{unknown[0]}: there are {', '.join(known)}")
    chosen = [known[name] for name in options.names] or list(known.values())
    if options.short:
        chosen = [scenario for scenario in chosen if scenario.short]
    if options.list:
        print("\n".join(scenario.name for scenario in chosen))
        return 0
    total = Result()
    print(
        f"{'command':28}{'changes':>8}{'kills':>8}{'states':>8}{'differences':>13}{'seconds':>9}",
        flush=True,
    )
    with campaign(options.copies) as at_work:
        for scenario in chosen:
            found = at_work.run(
                scenario, print if options.verbose else lambda line: None
            )
            _print_line(scenario.name, found)
            for line in found.differences:
                print(f"  {line}", flush=True)
            total.changes += found.changes
            total.kills += found.kills
            total.states += found.states
            total.differences += found.differences
            total.seconds += found.seconds
    _print_line("all", total)
    return 1 if total.differences else 0


def _print_line(name: str, found: Result) -> None:
    figures = f"{found.changes:8}{found.kills:8}{found.states:8}{len(found.differences):13}{found.seconds:9.1f}"
    print(f"{name:28}{figures}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
