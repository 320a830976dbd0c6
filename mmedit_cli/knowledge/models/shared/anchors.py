"""Anchors: names for the places of a model that editors work on, found from its structure, not from a table of paths.

Module paths change between releases of transformers and between families; the roles of the modules do not.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from mmedit_cli.errors import ModelError, near_miss

# below a layer of T5's decoder: attention, attention to the encoder, feed-forward
_T5_ATTENTION = "layer.0.SelfAttention"
_T5 = "layer.2.DenseReluDense"
_T5_IN = (f"{_T5}.wi_1", f"{_T5}.wi")
# role -> the names its module may carry below a decoder layer, the usual one first
_IN_LAYER = {
    "ffn_gate": ("mlp.gate_proj", f"{_T5}.wi_0"),
    "ffn_in": ("mlp.up_proj", "mlp.fc1", "fc1", "mlp.c_fc", *_T5_IN),
    "ffn_out": ("mlp.down_proj", "mlp.fc2", "fc2", "mlp.c_proj", f"{_T5}.wo"),
    "ffn_act": (
        "mlp.act_fn",
        "mlp.activation_fn",
        "activation_fn",
        "mlp.act",
        f"{_T5}.act",
    ),
    "attn": ("self_attn", "attn", _T5_ATTENTION),
    "attn_q": ("self_attn.q_proj", f"{_T5_ATTENTION}.q"),
    "attn_k": ("self_attn.k_proj", f"{_T5_ATTENTION}.k"),
    "attn_v": ("self_attn.v_proj", f"{_T5_ATTENTION}.v"),
    "attn_qkv": ("attn.c_attn",),
    "attn_out": (
        "self_attn.o_proj",
        "self_attn.out_proj",
        "attn.c_proj",
        f"{_T5_ATTENTION}.o",
    ),
}
_OTHER_MIXERS = ("linear_attn",)  # in the place of attention, in layers of Qwen3.5
# role -> the last part of its module's path, outside the language model
_IN_MODEL = {
    "vision": ("vision_tower", "vision_model", "visual"),
    "connector": ("qformer", "multi_modal_projector", "merger", "connector"),
    "projector": (
        "language_projection",
        "multi_modal_projector",
        "merger",
        "connector",
    ),
}
# the linear layers of a decoder layer, and those of its feed-forward part
LinearRole = Literal[
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_qkv",
    "attn_out",
    "ffn_in",
    "ffn_out",
    "ffn_gate",
]
FfnRole = Literal["ffn_in", "ffn_out", "ffn_gate"]
_NOT_LANGUAGE = ("vision", "visual", "qformer", "image", "connector")


class Anchors:
    """Resolves roles such as `ffn_out` to module paths of one model.

    Roles with a layer: layer, ffn_gate (gated networks), ffn_in, ffn_out, ffn_act, attn, attn_q, attn_k, attn_v,
    attn_out; attn_qkv where the first three are one matrix, as in GPT-2.
    Roles without: vision, connector, projector, norm, head.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        path, self.layers = _decoder_layers(model)
        self._layer = path + ".{}"
        self.stack = path.rpartition(".")[0]
        self._paths = _in_layer_paths(self.layers, self._layer)
        self._paths |= _in_model_paths(model, self.stack)
        self.tail = self._tail()
        if "norm" not in self._paths and len(self.tail) > 1:
            self._paths["norm"] = self.tail[0]
        self._paths["head"] = self.tail[-1]

    @property
    def roles(self) -> list[str]:
        """All roles this model has."""
        return sorted(self._paths)

    def path(self, role: str, layer: int | None = None) -> str:
        """Return the module path of a role (negative layers count from the end); raise ModelError if there is none."""
        if role not in self._paths:
            problem = f"this model has no anchor {role!r}{near_miss(role, self._paths)}"
            raise ModelError(problem, f"it has {', '.join(self.roles)}")
        template = self._paths[role]
        if "{}" not in template:
            return template
        if layer is None or not -len(self.layers) <= layer < len(self.layers):
            raise ModelError(
                f"anchor {role!r}: layer {layer} is outside 0 to {len(self.layers) - 1}"
            )
        return template.format(layer % len(self.layers))

    def module(self, role: str, layer: int | None = None) -> nn.Module:
        """Return the module of a role."""
        return self._model.get_submodule(self.path(role, layer))

    @property
    def below_connector(self) -> list[str]:
        """The modules whose outputs stay as they are while the connector changes: the vision tower, or its blocks.

        Blocks it is where the connector is a part of the tower (Qwen-VL's merger).
        """
        vision = self.path("vision")
        if not self.path("connector").startswith(vision + "."):
            return [vision]
        blocks = []
        for name, child in self.module("vision").named_children():
            if isinstance(child, nn.ModuleList):
                blocks += [f"{vision}.{name}.{i}" for i in range(len(child))]
        return blocks

    def _tail(self) -> list[str]:
        """Return the paths of what follows the last layer, in order: final norm, output projection, head."""
        stack = self._model.get_submodule(self.stack)
        children = dict(stack.named_children())
        paths = []
        for name in ("norm", "final_layer_norm", "ln_f", "project_out"):
            if isinstance(children.get(name), nn.Module):
                paths.append(f"{self.stack}.{name}")
        head = self._model.get_output_embeddings()  # type: ignore[operator]
        named = self._model.named_modules()
        paths.append(next(name for name, module in named if module is head))
        return paths


def _decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return (path, layers): the longest list of language-model blocks with attention and a feed-forward part."""
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(word in name for word in _NOT_LANGUAGE):
            continue
        if all(_is_decoder_block(block) for block in module):
            found.append((name, module))
    if not found:
        raise ModelError(
            f"{type(model).__name__}: no decoder layers with attention and a feed-forward part were found",
            "supported are decoder-only language models such as OPT and Llama",
        )
    return max(found, key=lambda item: len(item[1]))


def _is_decoder_block(block: nn.Module) -> bool:
    """Whether a module has attention and a feed-forward part: OPT has no module around the latter.

    A layer of T5's encoder is none: its feed-forward part has another number.
    """
    attends = any(_has(block, name) for name in (*_IN_LAYER["attn"], *_OTHER_MIXERS))
    return attends and any(_has(block, name) for name in ("mlp", "fc2", _T5))


def _in_layer_paths(layers: nn.ModuleList, template: str) -> dict[str, str]:
    """Return the roles that every layer has; in some models not all layers attend alike."""
    paths = {"layer": template}
    for role, names in _IN_LAYER.items():
        for name in names:
            if all(_has(layer, name) for layer in layers):
                paths[role] = f"{template}.{name}"
                break
    return paths


def _in_model_paths(model: nn.Module, stack: str) -> dict[str, str]:
    names = []
    for name, _ in model.named_modules():
        if name and not name.startswith(stack):
            names.append(name)
    paths = {}
    for role, endings in _IN_MODEL.items():
        matches = [name for name in names if name.rpartition(".")[2] in endings]
        if matches:
            paths[role] = min(matches, key=lambda name: (name.count("."), name))
    return paths


def check_upright(model: nn.Module, path: str, editor: str) -> None:
    """Raise ModelError for a linear layer whose matrix is written as (in, out), for an editor that knows no such."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(model.get_submodule(path), Conv1D):
        raise ModelError(
            f"{editor}: {path} is a transposed matrix, as GPT-2 has them",
            "ft, lora, multi-melo, t-patcher, grace, ultraedit, memit, alphaedit, mend and ike know such",
        )


def sizes(linear: nn.Module) -> tuple[int, int]:
    """Return how wide what enters a linear layer is, and what leaves it; GPT-2 writes its matrices transposed."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(linear, Conv1D):
        width, out = linear.weight.shape
        return width, out
    assert isinstance(linear, nn.Linear)
    return linear.in_features, linear.out_features


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
