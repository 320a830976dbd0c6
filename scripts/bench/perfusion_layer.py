"""What an edited projection costs beside a plain one: forward of 768 -> d with 4 prompts of 77 tokens.

    python scripts/bench/perfusion_layer.py [--rounds 60] [--dtype float32]

One thread. Edited is a Linear with the hook that Perfusion puts on it, with one concept and with two; similarities
and gates are shared by all layers and computed once for a prompt, so they are timed on their own. The sides run
interleaved; CPU times, median and least of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from mmedit_cli.drawing.methods.perfusion.rank_one import (
    Gates,
    add_edit,
    mixing_in_scope,
)
from mmedit_cli.output import Output
from mmedit_cli.patch import Patch
from mmedit_cli.runtime import versions

ROWS, TOKENS, WIDTH = 4, 77, 768


def timed(
    works: dict[str, Callable[[], object]], rounds: int
) -> dict[str, tuple[float, float]]:
    """Return (median, least) CPU milliseconds of each work, run in turn."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for i in range(rounds + 5):
        for name, work in works.items():
            start = time.process_time_ns()
            work()
            if i >= 5:  # the first rounds warm up
                found[name].append((time.process_time_ns() - start) / 1e6)
    return {
        name: (statistics.median(times), min(times)) for name, times in found.items()
    }


def edited(
    outputs: int, dtype: torch.dtype, concepts: int, hidden: torch.Tensor
) -> Callable[[], object]:
    """Return the forward pass of a layer with the hook on it."""
    holder = nn.ModuleDict({"to_v": nn.Linear(WIDTH, outputs, bias=False, dtype=dtype)})
    mixed = torch.rand(ROWS, TOKENS, 2 * concepts, dtype=dtype)
    rows = torch.rand(2 * concepts, outputs, dtype=dtype)
    Patch(holder).hook_call(
        "to_v", lambda _inputs, output: add_edit(output, mixed, rows)
    )
    return lambda: holder["to_v"](hidden)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, options.dtype)
    hidden = torch.randn(ROWS, TOKENS, WIDTH, dtype=dtype)
    inputs, duals = torch.randn(2, WIDTH), torch.randn(2, WIDTH)
    gates, scope = (
        Gates(torch.tensor([0.7] * 2), torch.tensor([0.15] * 2)),
        torch.ones(ROWS, 2, dtype=torch.bool),
    )
    table = []
    for outputs in (320, 640, 1280):
        plain = nn.Linear(WIDTH, outputs, bias=False, dtype=dtype)
        works = {
            "plain": lambda plain=plain: plain(hidden),
            "one": edited(outputs, dtype, 1, hidden),
            "two": edited(outputs, dtype, 2, hidden),
            "gates": lambda: mixing_in_scope(
                hidden.float(), inputs, duals, gates, scope
            ),
        }
        found = timed(works, options.rounds)
        base = found["plain"]
        cells = [f"{median:.2f} ({least:.2f})" for median, least in found.values()]
        ratios = [
            f"{found[n][0] / base[0]:.2f} ({found[n][1] / base[1]:.2f})"
            for n in ("one", "two")
        ]
        table.append([f"{WIDTH} -> {outputs}", *cells[:3], *ratios, cells[3]])
    out = Output()
    out.line(
        f"CPU ms, median (least) of {options.rounds} rounds, {options.dtype}, torch {versions()['torch']}"
    )
    out.table(
        [
            "layer",
            "plain",
            "1 concept",
            "2 concepts",
            "ratio 1",
            "ratio 2",
            "gates, once a prompt",
        ],
        table,
    )


if __name__ == "__main__":
    main()
