"""Models and editors by name: what library users call, and what every command begins with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedit_cli import registry
from mmedit_cli.catalog import ModelRef, loading
from mmedit_cli.errors import StateError, UserError
from mmedit_cli.hparams import to_dict
from mmedit_cli.knowledge.trained_networks import TrainedNetworks, find_networks
from mmedit_cli.output import Output
from mmedit_cli.reading import parse_json_object
from mmedit_cli.shapes import pick_variant, shape_of, shape_of_config

if TYPE_CHECKING:
    from mmedit_cli.knowledge.methods.base import Editor
    from mmedit_cli.knowledge.models.base import VisionLanguageModel


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    model: str
    device: str = "auto"
    dtype: str = "auto"
    device_map: str | None = None
    revision: str | None = None


def load_backbone(model: str, **options: Any) -> VisionLanguageModel:
    """Return the backbone for a name of the catalogue, a local folder or a hub id.

    `options` are device, dtype, device_map and revision, as on the command line.
    """
    from mmedit_cli.knowledge.models.shared import loading as models

    return models.load_backbone(model, **options)


def load_editor(
    name: str,
    backbone: VisionLanguageModel,
    *,
    hparams: Path | None = None,
    overrides: Sequence[str] = (),
    checkpoint: Path | str | None = None,
    seed: int = 0,
    records: Path = Path("records"),
) -> Editor:
    """Return an editor for a backbone, with the hyper-parameters of hparams/NAME.yaml and its variant for the model.

    `overrides` are KEY=VALUE texts. An editor that is trained first reads the networks that come along, or those that
    `checkpoint` names: "latest" (the newest training in `records`), a file, the folder or the id of a run; with
    "untrained" they are random. Raises UnknownName, HparamsError, UserError if there are no trained networks, or
    StateError if they do not fit.
    """
    cls = registry.editors.get(name)
    found = None
    if cls.trains and checkpoint != "untrained":
        found = find_networks(name, backbone.name, records, checkpoint).path
    cls, values = resolve_editor(
        name, variant_for(name, backbone, hparams), hparams, overrides, found
    )
    editor: Editor = cls(backbone, values, seed=seed)
    if found is not None:
        editor.load_networks(found)  # type: ignore[attr-defined]
    return editor


def networks_of(
    editor: str, model: str, records: Path, checkpoint: Path | str | None
) -> TrainedNetworks | None:
    """Return the networks of an editor that is trained first; None for another, which takes no `checkpoint`.

    Raises UserError.
    """
    if registry.editors.get(editor).trains:
        return find_networks(editor, model, records, checkpoint)
    if checkpoint is not None:
        raise UserError(
            f"--checkpoint {checkpoint}: {editor} has no networks",
            "leave the option out",
        )
    return None


def used_hparams(hparams: Any) -> dict[str, Any]:
    """Return the hyper-parameters that matter once an editor is trained: how that went is told by its own run."""
    return {key: value for key, value in to_dict(hparams).items() if key != "training"}


def resolve_editor(
    name: str,
    variant: str | None,
    file: Path | None,
    overrides: Sequence[str],
    networks: Path | None = None,
) -> tuple[type[Editor], Any]:
    """Return the class of an editor and its hyper-parameters, of a variant of the file (see `variant_for`).

    They are those of `file`, else those the networks were trained with, else hparams/NAME.yaml.
    """
    from mmedit_cli.hparams import load_hparams

    editor = registry.editors.get(name)
    if file is None and networks is not None:
        from mmedit_cli.knowledge.methods.base import read_state

        text = read_state(networks)[1].get("hparams", "{}")
        trained = parse_json_object(
            text, f"{networks}: hparams", error=StateError
        ).values
        overrides = [
            *(f"{key}={json.dumps(value)}" for key, value in trained.items()),
            *overrides,
        ]
    return editor, load_hparams(
        file or registry.hparams_file(name),
        editor.Hparams,
        variant=variant,
        overrides=overrides,
    )


def variant_for(
    editor: str, model: ModelRef | VisionLanguageModel, file: Path | None = None
) -> str | None:
    """Return which variant of an editor's hyper-parameters is for a model, by its config; None if there is none."""
    shape = (
        shape_of(model)
        if isinstance(model, ModelRef)
        else shape_of_config(model.model.config)
    )
    return pick_variant(file or registry.hparams_file(editor), shape, model.name)


def load_model(
    options: ModelOptions, ref: ModelRef, out: Output
) -> VisionLanguageModel:
    """Load the model that was found, saying so: it may take a while."""
    out.note(loading(ref.name))
    from mmedit_cli.knowledge.models.shared import loading as models

    return models.load_backbone(
        ref, device=options.device, dtype=options.dtype, device_map=options.device_map
    )
