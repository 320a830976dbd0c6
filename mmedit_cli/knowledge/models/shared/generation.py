"""Greedy decoding whatever a model's generation_config says; its settings are set aside, and can be named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

SAMPLINGS = ("greedy", "model")
# Settings that say which tokens there are, how long an answer may be and how it is computed, not which answer it is.
_HARMLESS = frozenset(
    {
        "bos_token_id",
        "cache_config",
        "cache_implementation",
        "decoder_start_token_id",
        "eos_token_id",
        "max_length",
        "max_new_tokens",
        "pad_token_id",
        "transformers_version",
        "use_cache",
    }
)
_OUTPUTS = (
    "return_dict_in_generate",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
)


def own_settings(*models: Any) -> dict[str, Any]:
    """Return what the generation_config of the models sets besides token ids and lengths, the first model first."""
    found: dict[str, Any] = {}
    for model in models:
        config = getattr(model, "generation_config", None)
        changed = {} if config is None else config.to_diff_dict()
        for name, value in changed.items():
            if name in _HARMLESS or name.startswith("_"):
                continue
            if value not in (None, False):
                found.setdefault(name, value)
    return found


def sampling_config(settings: Mapping[str, Any], **always: Any) -> Any:
    """Return a GenerationConfig with a model's own settings; `generate` still returns plain token ids with it."""
    from transformers import GenerationConfig

    followed = {name: value for name, value in settings.items() if name not in _OUTPUTS}
    return GenerationConfig(**{**followed, **always})


@contextmanager
def set_aside(model: Any) -> Iterator[None]:
    """Inside the block, `model.generate` reads no settings but those it is given.

    transformers fills what a given GenerationConfig leaves open from the one of the model.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def described(settings: Mapping[str, Any]) -> str:
    """Return settings as text, such as `repetition_penalty=1.05, top_k=1`."""
    return ", ".join(f"{name}={value}" for name, value in settings.items())


class WithoutQuestion:
    """A streamer without the question, or the token that begins an answer, which `generate` puts there first."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self._begun = False

    def put(self, tokens: Tensor) -> None:
        """Hand tokens on; none of the question."""
        self._real.put(tokens if self._begun else tokens[:, :0])
        self._begun = True

    def end(self) -> None:
        """Say that no more come."""
        self._real.end()
