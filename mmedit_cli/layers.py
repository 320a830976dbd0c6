"""Layers by depth: hyper-parameters name a decoder layer by its number, or by a fraction of the depth of the model.

The fraction f of a model with n layers is layer floor(f n): 0.66 is layer 21 of 32 and layer 3 of 6. So values that
were found for one model mean the same place in any other. A number below 0 counts from the end.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar, get_type_hints

from mmedit_cli.errors import HparamsError

Layer = int | float
T = TypeVar("T")


def check_layers(name: str, *layers: Layer) -> None:
    """Raise ValueError for a fraction of the depth that is not at least 0 and below 1."""
    for layer in layers:
        if isinstance(layer, float) and not 0 <= layer < 1:
            raise ValueError(
                f"{name} {layer}: a fraction of the depth is at least 0 and below 1; "
                "a layer by its number has no decimal point"
            )


def layer_number(layer: Layer, depth: int, *, lowest: int = 0) -> int:
    """Return the number of a layer of a model with so many layers; a fraction gives none below `lowest`."""
    if isinstance(layer, int):
        return layer
    return max(lowest, int(layer * depth))


def layer_of_model(layer: Layer, depth: int, name: str) -> int:
    """Return the number, from 0, of a layer of the model of that name; raise HparamsError if it has no such layer."""
    number = layer_number(layer, depth)
    if not -depth <= number < depth:
        raise HparamsError(f"layer {number}: {name} has the layers 0 to {depth - 1}")
    return number % depth


def layer_numbers(
    layers: tuple[Layer, ...], depth: int, *, lowest: int = 0
) -> tuple[int, ...]:
    """Return the numbers of several layers; fractions that name the same layer name it once."""
    numbers = [layer_number(layer, depth, lowest=lowest) for layer in layers]
    if all(isinstance(layer, int) for layer in layers):
        return tuple(numbers)
    return tuple(dict.fromkeys(numbers))


def count_above(share: Layer, depth: int) -> int:
    """Return how many layers lie above the depth 1 - share; a whole number is that many. At least one."""
    if isinstance(share, int):
        return share
    return max(1, depth - int((1 - share) * depth))


def at_depth(hparams: T, depth: int | None) -> T:
    """Return hyper-parameters with every fraction as the number of a layer.

    They come back as they are if the depth is not known, or if they name no layers.
    """
    resolve = getattr(hparams, "at_depth", None)
    if resolve is None or depth is None:
        return hparams
    resolved: T = resolve(depth)
    return resolved


@dataclass(frozen=True)
class LayerField:
    """The hyper-parameter of a method that names decoder layers.

    several: it is a list of them. counts: it says how many of the last layers are taken.
    """

    name: str
    several: bool = False
    counts: bool = False

    def choices(self, present: Any, depth: int) -> list[Any]:
        """Return the values to try on a model with so many layers, the lowest first.

        One layer each; of a list as many layers in a row as `present` has; of a count each count. `present`, whose
        layers are numbers, is among them.
        """
        found: list[Any] = []
        if self.counts:
            found += range(1, depth + 1)
        elif self.several:
            width = len(present)
            for end in range(width, depth + 1):
                layers = range(end - width, end)
                found.append(tuple(layers))
        else:
            found += range(depth)
        if present not in found:
            found.append(present)
        return found

    def from_zero(self, value: Any, depth: int) -> Any:
        """Return a value with numbers from 0 in the place of those that count from the end."""
        if self.counts:
            return value
        if self.several:
            return tuple(sorted(number % depth for number in value))
        return value % depth

    def highest(self, value: Any) -> int:
        """Return the highest layer that a value names, or the count."""
        return max(value) if self.several else int(value)


def layer_field(hparams: type[Any]) -> LayerField | None:
    """Return the field of a dataclass of hyper-parameters that is typed `Layer`, or as a tuple of these."""
    hints = get_type_hints(hparams)
    several = tuple[Layer, ...]
    for field in fields(hparams):
        name = field.name
        kind = hints[name]
        if kind == Layer:
            counts = name.endswith("layers")
            return LayerField(name, counts=counts)
        if kind == several:
            return LayerField(name, several=True)
    return None
