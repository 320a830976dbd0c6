"""The command line of the training scripts: options, stages one after another, a stop at any time, the log."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # threads that spin starve each other on a busy machine

import torch
from mini_training import BaseRecipe, BaseTrainee, read_progress, steps_of, train_stage

from mmedit_cli import runtime
from mmedit_cli.errors import UserError


class Stop:
    """Says when to stop: after so many minutes or steps, or at SIGTERM and Ctrl-C, always between two steps."""

    def __init__(self, minutes: float | None = None, steps: int | None = None) -> None:
        self._end = (
            time.monotonic() + 60 * minutes if minutes is not None else float("inf")
        )
        self._steps, self._asked = steps, False

    def listen(self) -> None:
        """Take signals as requests to stop."""
        for request in (signal.SIGTERM, signal.SIGINT):
            signal.signal(request, lambda *_: setattr(self, "_asked", True))

    def __call__(self) -> bool:
        if self._steps is not None:
            self._steps -= 1
        return (
            self._asked
            or time.monotonic() > self._end
            or (self._steps is not None and self._steps <= 0)
        )


def train_stages(
    trainee: BaseTrainee,
    out: Path,
    stages: Sequence[str],
    stop: Callable[[], bool],
    export: Callable[[], None],
) -> bool:
    """Train stages one after another, log to `OUT/log.jsonl`, export after each; return whether all were finished."""
    for name in stages:
        before = read_progress(out, name)
        if (
            name != stages[-1]
            and before is not None
            and before.step >= steps_of(trainee, name)[1]
        ):
            continue  # the next stage reads its file
        with (out / "log.jsonl").open("a", encoding="utf-8") as log:
            finished = train_stage(
                trainee, name, out, stop, lambda line, log=log: _say(line, log)
            )
        export()
        if not finished:
            return False
    return True


def _say(line: dict[str, Any], log: Any) -> None:
    log.write(json.dumps(line) + "\n")
    log.flush()
    known = "".join(
        f"  {column} {100 * value:.1f}" for column, value in line["accuracy"].items()
    )
    print(
        f"{line['stage']} {line['step']}/{line['steps']}  loss {line['loss']:.3f}{known}  "
        f"{line['pictures_per_second']:.0f} pictures/s  {line['seconds_left'] / 60:.0f} min left",
        flush=True,
    )


def training_record(trainee: BaseTrainee, out: Path) -> dict[str, Any]:
    """Return what a model folder tells about its training: how each stage went, the machine, the versions."""
    history = {}
    for name in trainee.recipe.stages:
        progress = read_progress(out, name)
        if progress is not None:
            stage = trainee.recipe.stages[name]
            each, steps = steps_of(trainee, name)
            history[name] = {
                "passes": round(progress.step / each, 2),
                "of": stage.passes,
            } | progress.__dict__
            history[name] |= {
                "pictures": progress.step * stage.pictures,
                "finished": progress.step == steps,
            }
    about = runtime.environment(trainee.device)
    machine = {
        key: about[key]
        for key in ("platform", "device", "device_name", "threads", "commit")
    }
    return {"stages": history, "machine": machine, "versions": runtime.versions()}


def run_parser(about: str, stages: Sequence[str]) -> argparse.ArgumentParser:
    """Return the options that all training scripts share."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, help="a YAML file beside this script")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder of the run; an earlier run in it is continued",
    )
    parser.add_argument(
        "--stage",
        choices=("all", *stages),
        default="all",
        help="train this stage alone",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=None,
        help="stop after that long; run again to continue",
    )
    parser.add_argument(
        "--no-resume", action="store_true", help="forget what is in OUT"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few dozen concepts and a smaller model"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    return parser


def run(
    args: argparse.Namespace,
    kind: type[BaseRecipe],
    train: Callable[..., bool],
    **options: Any,
) -> int:
    """Do what the options say and return the exit status; `options` are passed on to `train`."""
    try:
        recipe = kind.read(args.recipe, quick=args.quick)
        device = runtime.resolve_device(args.device)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        runtime.quiet_libraries()
        torch.set_float32_matmul_precision("high")
        if args.no_resume:
            shutil.rmtree(args.out, ignore_errors=True)
        stop = Stop(args.minutes)
        stop.listen()
        stages = tuple(recipe.stages) if args.stage == "all" else (args.stage,)
        if args.stage not in ("all", *recipe.stages):
            raise UserError(f"{args.recipe}: no stage {args.stage!r}")
        finished = train(
            recipe, args.out, device=device, stages=stages, stop=stop, **options
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    print(
        f"{args.out / recipe.name}"
        if finished
        else "stopped; the same command continues",
        flush=True,
    )
    return 0
