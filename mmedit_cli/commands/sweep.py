"""`mmedit sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mmedit_cli import options
from mmedit_cli.output import Output


def sweep(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE.yaml", help="Editors, models, seeds, orders."),
    ],
    on: Annotated[
        Literal["local", "ray", "slurm"],
        typer.Option(
            help="Where: in this process, on Ray (extra `ray`), or on Slurm (extra `slurm`)."
        ),
    ] = "local",
    workers: Annotated[int, typer.Option(help="Runs at once, on ray and slurm.")] = 1,
    cpus: Annotated[int, typer.Option(help="Cores a run.")] = 1,
    gpus: Annotated[float, typer.Option(help="GPUs a run.")] = 0.0,
    minutes: Annotated[int, typer.Option(help="Longest run, on slurm.")] = 240,
    partition: Annotated[
        str | None, typer.Option(help="Of Slurm.", show_default=False)
    ] = None,
    retries: Annotated[
        int, typer.Option(min=0, help="How often what failed is made again.")
    ] = 1,
    records: options.Records = Path("records"),
    force: options.Force = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Evaluate several editors on several models, with several seeds and orders of the cases: a run for each.

    The file lists them, and what `mmedit eval` is to do (docs/several-processes.md). Each run is one that `mmedit
    eval` makes, with the same records: what is finished is only read, what was interrupted goes on. What fails is
    made again at the end; what fails again is listed, and the exit code is 1.

    Examples:

      mmedit sweep sweep.yaml --dry-run

      mmedit sweep sweep.yaml --on ray --workers 2
    """
    from mmedit_cli.knowledge.workflow import sweeping
    from mmedit_cli.knowledge.workflow.engines import Resources, engine_of
    from mmedit_cli.reports import show, sweeps

    out = Output(as_json=as_json)
    needs = Resources(workers, cpus, gpus, minutes, partition)
    plan = sweeping.plan_sweep(file, records, force=force)
    if dry_run:
        show.plan(out, plan.describe())
        return
    engine = engine_of(on, needs, plan.folder)
    report = sweeping.sweep(plan, out, engine, retries)
    sweeps.print_sweep(out, report)
    sweeps.raise_failures(report)
