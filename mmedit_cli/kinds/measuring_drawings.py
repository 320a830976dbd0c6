"""The options of `mmedit eval` that both kinds of methods on text-to-image models take, written once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedit_cli import options
from mmedit_cli.kinds.base import Command
from mmedit_cli.output import Output

if TYPE_CHECKING:
    from mmedit_cli.drawing.workflow.resolving import DrawingEvalOptions

Measure = Callable[["DrawingEvalOptions", Output, bool], None]


def measures(data_option: Any, default: str) -> Callable[[Measure], Command]:
    """Return a decorator that makes a command of what is done with a request, an Output, and whether only to plan.

    `data_option` says what `--data` takes, `default` is what is measured without it.
    """

    def decorate(measure: Measure) -> Command:
        def evaluate(
            editor: options.Editor,
            config: options.RunFile = None,
            model: options.DrawingModel = None,
            data: str = default,
            root: options.Root = None,
            hparams: options.HparamsFile = None,
            overrides: options.Overrides = None,
            limit: options.Limit = None,
            seed: options.Seed = 0,
            device: options.Device = "auto",
            dtype: options.Dtype = "auto",
            revision: options.Revision = None,
            records: options.Records = Path("records"),
            force: options.Force = False,
            dry_run: options.DryRun = False,
            as_json: options.Json = False,
            debug: options.Debug = False,
        ) -> None:
            from mmedit_cli.drawing.workflow.resolving import DrawingEvalOptions

            out = Output(as_json=as_json)
            request = DrawingEvalOptions(
                editor,
                options.named_drawing(model, out),
                data,
                root,
                hparams,
                tuple(overrides or ()),
                limit,
                seed,
                records,
                force,
                device=device,
                dtype=dtype,
                revision=revision,
            )
            measure(request, out, dry_run)

        # typer reads help and options from these
        evaluate.__doc__ = measure.__doc__
        evaluate.__annotations__["data"] = data_option
        return evaluate

    return decorate
