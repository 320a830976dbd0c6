"""Checkpoints of the published LiveEdit (qizhou000/LiveEdit, `train_vllm_editor.py`) as trained networks of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mmedit_cli.catalog import find_model
from mmedit_cli.errors import ModelError
from mmedit_cli.knowledge.loading import (
    check_sight,
    depth_of,
    used_hparams,
    variant_for,
)
from mmedit_cli.layers import at_depth, layer_of_model
from mmedit_cli.model_folder import CHECKPOINT, loading
from mmedit_cli.shapes import shape_of
from mmedit_cli.storage import staged_folder, write_tensors

_MODULES = "train_modules"
# the modules there -> what they are called here
_PARTS = {
    "edit_extractor": "edit_extractor",
    "inpt_extractor": "input_extractor",
    "moegen_c": "generator_u",
    "moegen_r": "generator_v",
    "instant_reps_norm": "stream_norm",
}
# the parts of a name there -> what they are called here
_NAMES = {
    **_PARTS,
    "eqe1": "vision_queries",
    "eqe2": "prompt_queries",
    "vis_rep_prot": "vision_sentinel",
    "layer_norm1": "vision_norm",
    "layer_norm2": "prompt_norm",
    "layer_norm": "norm",
    "ca_query_info_ext1": "attn_prompt_for_vision",
    "ca_vision_info_ext": "attn_vision",
    "ca_query_info_ext2": "attn_prompt",
    "ca_lora": "attn",
    "phi": "queries",
    "q_mlp": "q",
    "k_mlp": "k",
    "v_mlp": "v",
}
# what goes beyond the paper is off; the layer is that of the configurations
_PUBLISHED: dict[str, Any] = {
    "variant": "paper",
    "answer_slots": False,
    "naming": None,
    "refine": 0,
    "top_k": None,
    "margin": 0.0,
    "heads": 8,
    "lora_scale": 5.0,
    "edit_layer": 0.66,
}
_AGAIN = "get the file again, or name another"


def convert(
    file: Path,
    out: Path,
    model: str,
    overrides: Sequence[str] = (),
    revision: str | None = None,
) -> dict[str, Any]:
    """Write the networks of a checkpoint to a new folder, for a model; return what they are.

    Raises ModelError if the folder exists, or if the file is no such checkpoint or does not fit the model.
    """
    from mmedit_cli.hparams import load_hparams
    from mmedit_cli.knowledge.methods.liveedit.editor import LiveEdit
    from mmedit_cli.registry import hparams_file

    if out.exists():
        raise ModelError(f"{out}: exists already", "name a folder that does not")
    ref = find_model(model, revision=revision)
    check_sight(LiveEdit.name, ref)
    tensors, facts = _read(file)
    hparams = load_hparams(
        hparams_file(LiveEdit.name),
        LiveEdit.Hparams,
        variant=variant_for(LiveEdit.name, ref),
        stored={**_PUBLISHED, **_shapes(file, tensors)},
        stored_in=str(file),
        overrides=overrides,
    )
    depth = depth_of(ref)
    if depth is None:
        problem = f"{ref.name}: its config does not say how many layers it has"
        raise ModelError(problem, "name the folder of the model with --model")
    layer_of_model(hparams.edit_layer, depth, ref.name)
    hparams = at_depth(hparams, depth)
    _check_fit(file, tensors, hparams, ref)
    metadata = LiveEdit.networks_metadata(hparams, ref.fingerprint)
    with staged_folder(out) as fresh:
        write_tensors(fresh / CHECKPOINT, tensors, {**metadata, **facts})
    return {
        "editor": LiveEdit.name,
        "model": ref.name,
        "checkpoint": str(out),
        "hparams": used_hparams(hparams),
        **facts,
    }


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors by our names, and how many steps made them if the file says it."""
    if not file.is_file():
        raise ModelError(f"{file}: no such file", "name the checkpoint of LiveEdit")
    content = _content(file)
    modules = content.get(_MODULES, content)
    if not isinstance(modules, Mapping):
        raise ModelError(f"{file}: {_MODULES}: not modules by name", _AGAIN)
    tensors = {}
    parts = set()
    for name, value in _flat(modules):
        words = _translated(name)
        if words and words[0] in _PARTS.values():
            full = ".".join(words)
            whole = value.float()
            tensors[full] = whole.contiguous()
            parts.add(words[0])
    missing = []
    for theirs, ours in _PARTS.items():
        if ours not in parts:
            missing.append(theirs)
    if missing:
        names = ", ".join(missing)
        raise ModelError(
            f"{file}: not a checkpoint of LiveEdit: no {names}",
            f"it has {_MODULES} with edit_extractor, inpt_extractor, moegen_c, moegen_r and instant_reps_norm",
        )
    steps = content.get("i")
    facts = {}
    if isinstance(steps, int):
        facts = {"steps": str(steps), "step": str(steps)}
    return tensors, facts


def _translated(name: str) -> list[str]:
    """Return the parts of a name as they are called here."""
    words = []
    for word in name.split("."):
        # of a model that was trained on several GPUs
        if word != "module":
            ours = _NAMES.get(word, word)
            words.append(ours)
    return words


def _content(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        from mmedit_cli.storage import read_tensors

        tensors, _ = read_tensors(file)
        return dict(tensors)
    import torch

    hint = "save its train_modules alone with torch.save, or as safetensors"
    with loading(file, problem="not a file of tensors", hint=hint):
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return dict(content)


def _flat(modules: Mapping[str, Any], place: str = "") -> list[tuple[str, Tensor]]:
    """Return (name, tensor) of nested state dicts, their names joined by points."""
    found: list[tuple[str, Tensor]] = []
    for name, value in modules.items():
        full = str(name)
        if place:
            full = f"{place}.{name}"
        if isinstance(value, Mapping):
            found += _flat(value, full)
        elif isinstance(value, Tensor):
            pair = (full, value)
            found.append(pair)
    return found


def _shapes(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the hyper-parameters that the shapes of the tensors show; raise ModelError if they show none."""
    try:
        _, vectors, dim = tensors["edit_extractor.vision_queries"].shape
        _, rank, _ = tensors["generator_u.queries"].shape
        _, sentinel, _ = tensors["input_extractor.vision_sentinel"].shape
    except (KeyError, ValueError) as error:
        problem = f"{file}: not a checkpoint of LiveEdit: eqe1, phi or vis_rep_prot"
        raise ModelError(f"{problem} is missing or of another shape", _AGAIN) from error
    return {
        "module_dim": dim,
        "feature_vectors": vectors,
        "rank": rank,
        "sentinel_tokens": sentinel,
    }


def _check_fit(
    file: Path, tensors: Mapping[str, Tensor], hparams: Any, ref: Any
) -> None:
    """Raise ModelError unless the tensors are all of these networks, finite, and as wide as the model."""
    import torch

    from mmedit_cli.knowledge.methods.liveedit.networks import LiveEditNetworks

    width = len(tensors.get("stream_norm.weight", ()))
    shape = shape_of(ref)
    if shape is not None and shape.width != width:
        raise ModelError(
            f"{file}: networks for a model of width {width}, and {ref.name} has {shape.width}",
            "name the model that they were trained for with --model",
        )
    if width % hparams.heads:
        raise ModelError(
            f"heads {hparams.heads}: does not divide the width {width} of the model",
            "--set heads=N",
        )
    with torch.device("meta"):
        networks = LiveEditNetworks(width, width, hparams)
    wanted = {name: value.shape for name, value in networks.state_dict().items()}
    found = {name: value.shape for name, value in tensors.items()}
    wrong = [name for name in wanted | found if wanted.get(name) != found.get(name)]
    if wrong:
        named = ", ".join(wrong[:3])
        problem = "missing, unknown or of another shape"
        raise ModelError(
            f"{file}: not a checkpoint of LiveEdit: {len(wrong)} tensors are {problem}, among them {named}",
            _AGAIN,
        )
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{file}: {name} is not finite", _AGAIN)
