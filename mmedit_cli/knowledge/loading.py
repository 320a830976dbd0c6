"""Models and editors by name: the functions that library users call and every command begins with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedit_cli import registry
from mmedit_cli.catalog import ModelRef, default_model, loading
from mmedit_cli.errors import StateError, UserError
from mmedit_cli.hparams import to_dict
from mmedit_cli.knowledge.trained_networks import TrainedNetworks, find_networks
from mmedit_cli.layers import at_depth
from mmedit_cli.output import Output
from mmedit_cli.reading import parse_json_object
from mmedit_cli.shapes import Shape, pick_variant, shape_of, shape_of_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mmedit_cli.knowledge.methods.base import Editor
    from mmedit_cli.knowledge.models.base import VisionLanguageModel


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded; without a name it is the default one, or the one that a ledger is about."""

    model: str = ""
    device: str = "auto"
    dtype: str = "auto"
    device_map: str | None = None
    revision: str | None = None

    @property
    def named(self) -> str:
        """The name, or that of the default model."""
        return self.model or default_model()


def load_backbone(
    model: str | Path | PreTrainedModel | None = None,
    processor: Any = None,
    *,
    same_as: str | None = None,
    **options: Any,
) -> VisionLanguageModel:
    """Return the backbone for a name of the catalogue, a local folder or a hub id; without one the default model.

    `options` are device, dtype, device_map and revision, as on the command line.

    A model of transformers that is loaded already is taken as it is, with its `processor` (a language model's is its
    tokenizer); no weight of it needs a gradient from then on. `same_as` names the model it is, so that networks and
    states which belong to that one fit; without it a digest of its weights stands for it. Raises ModelError if it
    cannot be edited.
    """
    from mmedit_cli.knowledge.models.shared import loading as models

    if model is None or isinstance(model, str | Path):
        return models.load_backbone(str(model or default_model()), **options)
    if options:
        given = ", ".join(options)
        raise UserError(f"{given}: the model is loaded already", "leave them out")
    return models.wrapped(model, processor, same_as)


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
    check_sight(name, backbone)
    found = None
    if registry.editors.get(name).trains and checkpoint != "untrained":
        found = find_networks(name, backbone.name, records, checkpoint).path
    cls, values = resolve_editor(
        name,
        variant_for(name, backbone, hparams),
        hparams,
        overrides,
        found,
        depth=backbone.n_layers,
    )
    editor: Editor = cls(backbone, values, seed=seed)
    if found is not None:
        give_networks(editor, found)
    return editor


def check_sight(editor: str, model: ModelRef | VisionLanguageModel) -> None:
    """Raise UserError for an editor that routes by the picture on a model that sees none.

    The same for one that works on the layers which read the question, where those are not the layers that answer.
    """
    _check_layers(editor, model)
    if not registry.editors.get(editor).needs_image:
        return
    if not registry.backbones.fact(model.family, "sees"):
        able = [
            name
            for name in registry.editors.names()
            if not registry.editors.fact(name, "needs_image")
        ]
        raise UserError(
            f"{editor} routes by the picture, and {model.name} is a language model, which sees none",
            f"editors of facts in text: {', '.join(able)}",
        )


def _check_layers(editor: str, model: ModelRef | VisionLanguageModel) -> None:
    """Raise UserError for an editor that is not made for an encoder and a decoder, on a model that has both."""
    if not registry.backbones.fact(model.family, "encoder_decoder"):
        return
    able = [
        name
        for name in registry.editors.names()
        if registry.editors.fact(name, "encoder_decoder")
    ]
    if editor not in able:
        raise UserError(
            f"{editor} reads the question where the answer is written, and {model.name} has an encoder for it",
            f"editors of such models: {', '.join(able)}",
        )


def give_networks(editor: Editor, file: Path) -> None:
    """Load trained networks into an editor that has some; raise StateError if they do not fit."""
    from mmedit_cli.knowledge.methods.base import TrainedEditor

    assert isinstance(editor, TrainedEditor), f"{editor.name} has no networks"
    editor.load_networks(file)


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
    """Return the hyper-parameters that matter once an editor is trained; those of the training are in its own run."""
    return {key: value for key, value in to_dict(hparams).items() if key != "training"}


def resolve_editor(
    name: str,
    variant: str | None,
    file: Path | None,
    overrides: Sequence[str],
    networks: Path | None = None,
    *,
    depth: int | None = None,
) -> tuple[type[Editor], Any]:
    """Return the class of an editor and its hyper-parameters, of a variant of the file (see `variant_for`).

    Layers that are named by a fraction of the depth become numbers if the `depth` of the model is given.
    They are those of `file`, else those the networks were trained with, else hparams/NAME.yaml.
    """
    from mmedit_cli.hparams import load_hparams

    editor = registry.editors.get(name)
    trained: dict[str, Any] = {}
    place = f"{networks}: hparams"
    if file is None and networks is not None:
        from mmedit_cli.knowledge.methods.base import read_state

        _, metadata = read_state(networks)
        text = metadata.get("hparams", "{}")
        trained = parse_json_object(text, place, error=StateError).values
    hparams = load_hparams(
        file or registry.hparams_file(name),
        editor.Hparams,
        variant=variant,
        stored=trained,
        stored_in=place,
        overrides=overrides,
    )
    return editor, at_depth(hparams, depth)


def variant_for(
    editor: str, model: ModelRef | VisionLanguageModel, file: Path | None = None
) -> str | None:
    """Return which variant of an editor's hyper-parameters is for a model, by its config; None if there is none."""
    file = file or registry.hparams_file(editor)
    return pick_variant(file, _shape_of(model), model.name)


def depth_of(model: ModelRef | VisionLanguageModel) -> int | None:
    """Return the number of decoder layers of a model, by its config; None if it does not say it."""
    shape = _shape_of(model)
    return None if shape is None else shape.depth


def _shape_of(model: ModelRef | VisionLanguageModel) -> Shape | None:
    if isinstance(model, ModelRef):
        return shape_of(model)
    return shape_of_config(model.model.config)


def load_model(
    options: ModelOptions, ref: ModelRef, out: Output
) -> VisionLanguageModel:
    """Load the model that was found, and say so: it may take a while."""
    out.note(loading(ref.name))
    from mmedit_cli.knowledge.models.shared import loading as models

    return models.load_backbone(
        ref, device=options.device, dtype=options.dtype, device_map=options.device_map
    )
