"""What threads cost beside other work: CPU and wall time of the same forward passes, as ratios to one thread.

    python scripts/bench/threads.py [--threads 2] [--rounds 5] [--busy 2]

The work is the feed-forward part of a small decoder, of the width and depth of mini-blip2, on 16 questions.

A process for each setting: one thread, several, and several that sleep while they wait (OMP_WAIT_POLICY=PASSIVE, the
default of `mmedit`). They take turns, pass by pass, so that they meet the same machine. `--busy N` starts N processes
that only compute; with 0 the machine is as busy as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

ROWS, TOKENS, WIDTH, LAYERS = 16, 40, 192, 6
PASSES = 20  # in a turn
_BURN = "while True: sum(range(10**6))"


def settings(threads: int) -> dict[str, dict[str, str]]:
    """Return the variables of each setting."""
    several = {"OMP_NUM_THREADS": str(threads)}
    return {
        "1 thread": {"OMP_NUM_THREADS": "1"},
        f"{threads} threads": several,
        f"{threads} threads, PASSIVE": {**several, "OMP_WAIT_POLICY": "PASSIVE"},
    }


def serve() -> None:
    """Do a turn for every line that comes in; say how long it took, in CPU and wall time."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers = nn.ModuleList()
    for _ in range(LAYERS):
        inner = nn.Sequential(
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 4 * WIDTH),
            nn.GELU(),
            nn.Linear(4 * WIDTH, WIDTH),
        )
        layers.append(inner)
    tokens = torch.randn(ROWS, TOKENS, WIDTH)

    def work() -> None:
        hidden = tokens
        for layer in layers:
            hidden = hidden + layer(hidden)

    with torch.no_grad():
        work()
        print("ready", flush=True)
        for _ in sys.stdin:
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(PASSES):
                work()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            print(json.dumps([cpu, wall]), flush=True)


@contextmanager
def processes(*commands: tuple[list[str], dict[str, str]]) -> Iterator[list]:
    """Start processes that end with the block."""
    started = []
    try:
        for words, variables in commands:
            environment = {**os.environ, **variables}
            environment.pop("OMP_WAIT_POLICY", None)
            environment |= variables
            started.append(
                subprocess.Popen(
                    [sys.executable, *words],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def measure(threads: int, rounds: int) -> dict[str, list[list[float]]]:
    """Return (CPU, wall) seconds of each turn of each setting."""
    chosen = settings(threads)
    words = [__file__, "--serve"]
    found: dict[str, list[list[float]]] = {name: [] for name in chosen}
    with processes(*((words, variables) for variables in chosen.values())) as workers:
        for worker in workers:
            worker.stdout.readline()
        for _ in range(rounds):
            for name, worker in zip(chosen, workers, strict=True):
                worker.stdin.write("\n")
                worker.stdin.flush()
                found[name].append(json.loads(worker.stdout.readline()))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load {load:.1f}, and {options.busy} processes more")
    burners = [(["-c", _BURN], {})] * options.busy
    with processes(*burners):
        found = measure(options.threads, options.rounds)
    (first_cpu, first_wall), *_ = medians(found)
    for name, (cpu, wall) in zip(found, medians(found), strict=True):
        ratios = f"{cpu / first_cpu:5.2f} times the CPU time, {wall / first_wall:5.2f} times the wall time"
        print(f"{name:>20}: {cpu:.3f} s CPU, {wall:.3f} s: {ratios}")


def medians(found: dict[str, list[list[float]]]) -> list[tuple[float, float]]:
    """Return the median (CPU, wall) seconds of each setting."""
    rows = []
    for turns in found.values():
        cpus, walls = zip(*turns, strict=True)
        rows.append((statistics.median(cpus), statistics.median(walls)))
    return rows


if __name__ == "__main__":
    main()
