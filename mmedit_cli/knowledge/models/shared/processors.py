"""The processor of a model without its part for videos, and what it makes of a text and a picture of some size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmedit_cli.errors import ModelError
from mmedit_cli.reading import read_json_object

_CONFIGS = ("processor_config.json", "preprocessor_config.json")
_LARGE = 4096  # numbers
_OF_IDS = ("add_special_tokens",)  # the options of a tokenizer that change the ids
# what a processor may have beside images and text, which needs torchvision or reads sound
_LEFT_OUT = ("video_processor", "feature_extractor", "audio_processor")


def processor_class(config: Any) -> type[Any]:
    """Return the class of the processor of a model, for pictures and text alone; raise ModelError without one."""
    from transformers import PROCESSOR_MAPPING

    # its annotations are those of a mapping that holds pairs
    known: Any = PROCESSOR_MAPPING
    if type(config) not in known:
        raise ModelError(
            f"transformers has no processor for a model of type {config.model_type!r}",
            "a family of a plug-in can say how its pictures enter: CONTRIBUTING.md",
        )
    return images_only(known[type(config)])


def images_only(whole: type[Any]) -> type[Any]:
    """Return a processor class without the parts for videos and sound; one that has none is returned as it is.

    It bears the same name, so that what is saved with it opens as what it was.
    """
    parts = whole.get_attributes()
    kept = [name for name in parts if name not in _LEFT_OUT]
    if kept == parts:
        return whole
    return type(
        whole.__name__,
        (whole,),
        {
            "__module__": whole.__module__,
            "get_attributes": classmethod(lambda _cls: list(kept)),
        },
    )


def make_processor(
    config: Any, images: Any, tokenizer: Any, settings: Mapping[str, Any]
) -> Any:
    """Return the processor of a model made of its parts; `settings` are what its own files say beside them."""
    kind = processor_class(config)
    given = {"image_processor": images, "tokenizer": tokenizer}
    parts = [given[name] for name in kind.get_attributes() if name in given]
    absent = dict.fromkeys(_LEFT_OUT)
    accepted = kind.__init__.__code__.co_varnames
    nothing = {name: value for name, value in absent.items() if name in accepted}
    known = {**settings, **nothing}
    for name in given:
        known.pop(name, None)
    return kind.from_args_and_dict(parts, known)


def processor_settings(folder: Path) -> dict[str, Any]:
    """Return what a model folder says about its processor; raise ModelError for a file that is no JSON object."""
    found: dict[str, Any] = {}
    for name in reversed(_CONFIGS):
        if (folder / name).is_file():
            content = read_json_object(
                folder / name, error=ModelError, hint="copy it again"
            )
            found |= content.values
    return found


class Remembered:
    """An image processor that works once: what it made of a picture stands for every picture after it.

    Of pixels only the shape is kept.
    """

    def __init__(self, real: Any) -> None:
        self._real = real
        self.found: dict[str, Any] = {}

    def __call__(self, *images: Any, **options: Any) -> Any:
        if not self.found:
            made = self._real(*images, **options)
            self.found = {name: _light(value) for name, value in made.items()}
        return dict(self.found)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _light(value: Any) -> Any:
    """Return zeros of the same shape, without memory of their own, in the place of a large array."""
    import numpy as np
    import torch

    if isinstance(value, list | tuple):
        return [_light(part) for part in value]
    if isinstance(value, torch.Tensor) and value.numel() > _LARGE:
        return torch.zeros((), dtype=value.dtype).expand(value.shape)
    if isinstance(value, np.ndarray) and value.size > _LARGE:
        return np.broadcast_to(np.zeros((), value.dtype), value.shape)
    return value


class Overheard:
    """A tokenizer that keeps what it was asked last: the text in its final form, and with which options."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.text = ""
        self.of_ids: dict[str, Any] = {}

    def __call__(self, text: Any, **options: Any) -> Any:
        self.text = text if isinstance(text, str) else text[0]
        # the others say what is returned beside the ids
        self.of_ids = {name: options[name] for name in _OF_IDS if name in options}
        return self._real(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@contextmanager
def standing_in(processor: Any, images: Any, tokenizer: Any) -> Iterator[None]:
    """Inside the block, a processor works with another image processor and another tokenizer."""
    parts = (processor.image_processor, processor.tokenizer)
    processor.image_processor, processor.tokenizer = images, tokenizer
    try:
        yield
    finally:
        processor.image_processor, processor.tokenizer = parts
