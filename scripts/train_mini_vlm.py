"""Train a mini vision-language model on EmojiKB: tower, then decoder, then both together.

    python scripts/train_mini_vlm.py scripts/mini_blip2.yaml --out runs/mini-blip2             # again: continues
    python scripts/train_mini_vlm.py scripts/mini_blip2.yaml --out runs/mini-blip2 --minutes 30  # stops in time
    python scripts/train_mini_vlm.py scripts/mini_blip2.yaml --out /tmp/quick --quick            # a minute

`OUT/<stage>.safetensors` holds what a stage is continued from, `OUT/log.jsonl` its curve, and `OUT/<name>/` the model
as it is shipped, in float16. Continued or not, the result is the same to the last bit on a CPU with as many threads.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin starve each other on a busy machine

import torch
from mini_vlm_data import load_emojikb
from mini_vlm_model import STAGES, Recipe, export, read_recipe
from mini_vlm_training import COLUMNS, Trainee, adopt_tower, read_progress, steps_of, train_stage

from mmedit_cli import runtime
from mmedit_cli.errors import UserError


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="mini_blip2.yaml or mini_llava.yaml")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; an earlier run in it is continued")
    parser.add_argument("--stage", choices=("all", *STAGES), default="all", help="train this stage alone")
    parser.add_argument("--minutes", type=float, default=None, help="stop after that long; run again to continue")
    parser.add_argument("--no-resume", action="store_true", help="forget what is in OUT")
    parser.add_argument("--quick", action="store_true", help="a few dozen concepts and a smaller model")
    parser.add_argument("--tower-from", type=Path, help="mini-llava: start from this tower.safetensors of mini-blip2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    return parser.parse_args(argv)


class Stop:
    """Says when to stop: after so many minutes or steps, or at SIGTERM and Ctrl-C, always between two steps."""

    def __init__(self, minutes: float | None = None, steps: int | None = None) -> None:
        self._end = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
        self._steps, self._asked = steps, False

    def listen(self) -> None:
        """Take signals as requests to stop."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(self, "_asked", True))

    def __call__(self) -> bool:
        if self._steps is not None:
            self._steps -= 1
        return self._asked or time.monotonic() > self._end or (self._steps is not None and self._steps <= 0)


def train(
    recipe: Recipe,
    out: Path,
    *,
    device: torch.device,
    stages: tuple[str, ...],
    stop: Stop,
    tower_from: Path | None = None,
) -> bool:
    """Train the stages one after another and write the model folder; return whether all came to their end.

    With `tower_from`, the tower.safetensors of a BLIP-2 run, a run of LLaVA that begins starts from that tower.
    """
    out.mkdir(parents=True, exist_ok=True)
    kb = load_emojikb(**_data(recipe))
    trainee = Trainee(recipe, kb, device)
    if tower_from is not None and not any((out / f"{stage}.safetensors").exists() for stage in STAGES):
        adopt_tower(trainee, tower_from, out)
    for name in stages:
        with (out / "log.jsonl").open("a", encoding="utf-8") as log:
            finished = train_stage(trainee, name, out, stop, lambda line, log=log: _say(line, log))
        export(trainee.adapter, out / recipe.name, _records(trainee, out))
        if not finished:
            return False
    return True


def _data(recipe: Recipe) -> dict[str, Any]:
    return {
        "n": recipe.data["concepts"],
        "held_out_concepts": recipe.data["held_out_concepts"],
        "held_out_artists": recipe.data["held_out_artists"],
    }


def _records(trainee: Trainee, out: Path) -> dict[str, Any]:
    """Return what the model folder tells about its training: what was held out, and how it went."""
    holdout = trainee.kb.holdout
    history = {}
    for name in STAGES:
        progress = read_progress(out, name)
        if progress is not None:
            stage = trainee.recipe.stages[name]
            each, steps = steps_of(trainee, stage)
            history[name] = {"passes": round(progress.step / each, 2), "of": stage.passes} | progress.__dict__
            history[name] |= {"pictures": progress.step * stage.pictures, "finished": progress.step == steps}
    about = runtime.environment(trainee.device)
    machine = {key: about[key] for key in ("platform", "device", "device_name", "threads", "commit")}
    return {
        "holdout.json": {"concepts": list(holdout.concepts), "artists": holdout.artists},
        "training.json": {
            "name": trainee.recipe.name,
            "concepts": len(trainee.kb.concepts),
            "trained_pictures": len(trainee.pictures.usable),
            "parameters": sum(p.numel() for p in trainee.model.parameters()),
            "stages": history,
            "machine": machine,
            "versions": runtime.versions(),
        },
    }


def _say(line: dict[str, Any], log: Any) -> None:
    log.write(json.dumps(line) + "\n")
    log.flush()
    known = " ".join(f"{c} {100 * line['accuracy'][c]:.1f}" for c in COLUMNS if c in line["accuracy"])
    print(
        f"{line['stage']} {line['step']}/{line['steps']}  loss {line['loss']:.3f}  {known}  "
        f"{line['pictures_per_second']:.0f} pictures/s  {line['seconds_left'] / 60:.0f} min left",
        flush=True,
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        recipe = read_recipe(args.recipe, quick=args.quick)
        device = runtime.resolve_device(args.device)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        runtime.quiet_libraries()
        torch.set_float32_matmul_precision("high")
        if args.no_resume:
            shutil.rmtree(args.out, ignore_errors=True)
        stop = Stop(args.minutes)
        stop.listen()
        stages = STAGES if args.stage == "all" else (args.stage,)
        finished = train(recipe, args.out, device=device, stages=stages, stop=stop, tower_from=args.tower_from)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{args.out / recipe.name}" if finished else "stopped; the same command continues", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
