"""LoRA layers of peft on a model, put there by peft alone.

transformers and diffusers have adapter methods of their own, but those check versions of their own: a transformers
that asks for a peft which is not released yet would break every LoRA. peft's public functions need neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmedit_cli.patch import Patch, bring_in

Pair = tuple[Tensor, Tensor]  # A (r, in) and B (out, r) of one linear layer
_NAME = "default"  # of the adapter, for peft


class LoraLayers:
    """One LoRA adapter around linear layers of a model: x -> W x + alpha / rank * B A x.

    peft wraps the layers inside a dictionary of their own and the patch puts them into the model, so undoing the patch
    leaves no mark. `modules` has them by path, with / in the place of every dot.
    """

    def __init__(
        self,
        patch: Patch,
        ranks: Mapping[str, int],
        alphas: Mapping[str, float],
        seed: int = 0,
    ) -> None:
        """Put a new adapter, which changes nothing yet, around the layers at the paths of `ranks` and `alphas`."""
        from peft import LoraConfig, inject_adapter_in_model

        self.paths = tuple(ranks)
        for path in self.paths:
            bring_in(patch.model, path)
        self.modules = nn.ModuleDict(
            {_key(path): patch.model.get_submodule(path) for path in self.paths}
        )
        config = LoraConfig(
            target_modules=list(self.modules),
            fan_in_fan_out=any(map(is_transposed, self.modules.values())),
            rank_pattern={_key(path): rank for path, rank in ranks.items()},
            alpha_pattern={_key(path): alpha for path, alpha in alphas.items()},
            lora_dropout=0.0,
            bias="none",
        )
        # peft draws A from the global source of randomness
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, self.modules, _NAME)
        self.modules.eval()
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for path in self.paths:
            patch.replace(path, self.modules[_key(path)])

    @classmethod
    def of(cls, patch: Patch, pairs: Mapping[str, Pair]) -> LoraLayers:
        """Put a finished adapter around layers: the product B A is added as it is."""
        ranks = {path: len(down) for path, (down, _) in pairs.items()}
        layers = cls(patch, ranks, ranks)
        named = {}
        for path, (down, up) in pairs.items():
            named[f"{_key(path)}.lora_A.weight"] = down
            named[f"{_key(path)}.lora_B.weight"] = up
        layers.load(named)
        return layers

    def parameters(self) -> list[nn.Parameter]:
        """Return A and B of every layer."""
        named = self.modules.named_parameters()
        return [parameter for name, parameter in named if "lora_" in name]

    def pairs(self) -> dict[str, Pair]:
        """Return A and B by the path of their layer."""
        found = {}
        for path in self.paths:
            layer: Any = self.modules[_key(path)]
            down: Tensor = layer.lora_A[_NAME].weight
            up: Tensor = layer.lora_B[_NAME].weight
            found[path] = (down, up)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of A and B under the names that `load` takes."""
        from peft import get_peft_model_state_dict

        found = get_peft_model_state_dict(self.modules, adapter_name=_NAME)
        return {name: tensor.detach().clone() for name, tensor in found.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite A and B with what `tensors` gave."""
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(self.modules, dict(tensors), adapter_name=_NAME)


def joined(many: Sequence[Mapping[str, Pair]]) -> dict[str, Pair]:
    """Return several adapters as one that adds what all of them add: their ranks stand one after another."""
    by_path: dict[str, list[Pair]] = {}
    for pairs in many:
        for path, pair in pairs.items():
            by_path.setdefault(path, []).append(pair)
    found = {}
    for path, here in by_path.items():
        down = torch.cat([a for a, _ in here])
        up = torch.cat([b for _, b in here], dim=1)
        found[path] = (down, up)
    return found


def is_transposed(linear: nn.Module) -> bool:
    """Whether a linear layer keeps its matrix as (in, out), as those of GPT-2 do; peft wants to be told."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(linear, Conv1D)


def _key(path: str) -> str:
    return path.replace(".", "/")
