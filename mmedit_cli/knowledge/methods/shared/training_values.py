"""What the values of every training of an editor have to be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_ABOVE_ZERO = ("steps", "learning_rate", "validate_every", "validation_cases")


def check_training(training: Any, *, above_zero: Iterable[str] = ()) -> None:
    """Raise ValueError if a value that must be above 0 is not, or `patience` is neither null nor at least 1."""
    for name in (*_ABOVE_ZERO, *above_zero):
        value = getattr(training, name)
        if value <= 0:
            raise ValueError(f"{name} must be above 0, not {value}")
    patience = training.patience
    if patience is not None and patience < 1:
        raise ValueError(f"patience must be at least 1 or null, not {patience}")
