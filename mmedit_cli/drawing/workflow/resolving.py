"""What every evaluation of drawings resolves before a model is loaded: names, hyper-parameters, the run's folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mmedit_cli import registry, runtime
from mmedit_cli.catalog import ModelRef, find_model
from mmedit_cli.hparams import to_dict
from mmedit_cli.records import Run
from mmedit_cli.shapes import hparams_for

# overrides that say how pictures are drawn and looked at begin with it
_SETTING = "eval."


Plan = TypeVar("Plan")


@dataclass(frozen=True)
class DrawingEvalOptions(runtime.LoadOptions):
    """What to evaluate. `overrides` are KEY=VALUE texts.

    Those that begin with `eval.` say how pictures are drawn and looked at, the others are hyper-parameters.
    """

    editor: str
    model: str
    data: str
    root: Path | None = None
    hparams: Path | None = None
    overrides: Sequence[str] = ()
    limit: int | None = None
    seed: int = 0
    records: Path = Path("records")
    force: bool = False


class OpenedData(Protocol):
    """Data that were opened: a name, and a digest of what they hold."""

    @property
    def name(self) -> str:
        """What the data are called."""

    def fingerprint(self) -> str:
        """Return a digest of the data."""


@dataclass(frozen=True)
class Resolved:
    """A method, a model and hyper-parameters that were found for `options`; `settings` are texts KEY=VALUE."""

    options: DrawingEvalOptions
    ref: ModelRef
    hparams: Any
    variant: str | None
    settings: tuple[str, ...]

    def planned(
        self,
        kind: Callable[..., Plan],
        below: str,
        found: OpenedData,
        cases: int,
        settings: Any,
    ) -> Plan:
        """Return the plan of an evaluation: what was resolved, with how to draw, the data, and where it is recorded.

        `below` is the folder in the records folder, `cases` how many there are.
        """
        config = self._config(found, cases, asdict(settings))
        names = (below, self.options.editor, self.ref.name, found.name)
        folder = Run.locate(self.options.records, names, config)
        return kind(
            self.options,
            self.ref,
            self.hparams,
            settings,
            found,
            config,
            folder,
        )

    def _config(self, found: OpenedData, cases: int, settings: Any) -> dict[str, Any]:
        """Return all that tells a run from others: what is evaluated, on what, how, and by which versions."""
        options = self.options
        return {
            "command": "eval",
            "editor": options.editor,
            "hparams": to_dict(self.hparams),
            "variant": self.variant,
            "model": self.ref.described(),
            "device": options.device,
            "dtype": options.dtype,
            "data": {
                "name": found.name,
                "cases": cases,
                "fingerprint": found.fingerprint(),
            },
            "settings": settings,
            "seed": options.seed,
            "versions": runtime.versions(),
        }


def resolve(options: DrawingEvalOptions, methods: registry.Registry[Any]) -> Resolved:
    """Find a method among others of its kind, a model that draws, and hyper-parameters; loads no model.

    Raises a UserError for what cannot be used.
    """
    from mmedit_cli.drawing.models.loading import check_draws

    options = replace(options, editor=options.editor.replace("_", "-"))
    cls = methods.get(options.editor)
    ref = find_model(options.model, revision=options.revision)
    check_draws(ref)
    settings: list[str] = []
    for_method: list[str] = []
    for text in options.overrides:
        chosen = settings if text.startswith(_SETTING) else for_method
        chosen.append(text)
    hparams, variant = hparams_for(
        options.editor,
        cls.Hparams,
        ref,
        options.hparams,
        overrides=for_method,
    )
    return Resolved(options, ref, hparams, variant, tuple(settings))


def named_settings(texts: Sequence[str], kinds: dict[str, type]) -> dict[str, Any]:
    """Return settings by their names without `eval.`; raise UserError for one that is none of `kinds`."""
    from mmedit_cli.hparams import read_values

    values = read_values(texts, kinds)
    return {key.removeprefix(_SETTING): value for key, value in values.items()}
