"""A model with WISE's edits, on transformers alone: from_pretrained, forward, and generate with its cache.

    from transformers import AutoModelForImageTextToText
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)

or, with this file beside your own, `EditedModel.from_pretrained(FOLDER)`. What comes back is the base model, from the
folder `base`, with hooks that add the side memories of `edits.safetensors` to one matrix. Which memory a question has,
if any, is decided from its words when it is read first, and holds for every token generated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from mmedit_cli.knowledge.methods.shared.exported_runtime import (
    Loader,
    Question,
    RoutedEdits,
)
from mmedit_cli.knowledge.methods.shared.question_end import only_last
from mmedit_cli.knowledge.methods.wise.memories import (
    NONE,
    add_memories,
    reaction,
    strongest,
)


class WiseEdits(RoutedEdits):
    """The side memories on one model; which of them a row has is decided on entering the matrix."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._sequences = 1
        self._read_now: Question | None = None
        self.chosen: Tensor | None = None
        self.patch.hook_call(self.settings.matrix, self._adapt)

    def choose(self, hidden: Tensor, question: Question) -> None:
        """Note the question: what tells it from others is known in the middle of this layer."""
        self._read_now = question

    def change(self, hidden: Tensor) -> None:
        """Note how many sequences the pass has."""
        self._sequences = len(hidden)

    def _adapt(self, x: Tensor, out: Tensor) -> Tensor | None:
        """Add the memory of each row to what leaves the matrix."""
        x = x.reshape(self._sequences, -1, x.shape[-1])
        if self._read_now is not None:
            self._decide(x, self._read_now.prompt)
            self._read_now = None
        if self.chosen is None:
            return None
        by_sequence = out.reshape(self._sequences, -1, out.shape[-1])
        deltas = list(self.tensors["delta"])
        changed = add_memories(
            x,
            by_sequence,
            deltas,
            self.chosen,
        )
        return None if changed is None else changed.reshape(out.shape)

    @torch.no_grad()
    def _decide(self, x: Tensor, words: Tensor) -> None:
        at = words
        if self.settings.positions == "last":
            at = only_last(words)
        reactions = []
        for delta in self.tensors["delta"]:
            reacted = reaction(x, delta, at)
            reactions.append(reacted)
        self.chosen = strongest(
            torch.stack(reactions, 1),
            self.tensors["threshold"],
        )
        self.weights = [self._edits_of(memory) for memory in self.chosen.tolist()]

    def _edits_of(self, memory: int) -> dict[int, float]:
        """Return the edits of a memory, in equal parts."""
        if memory == NONE:
            return {}
        counts = self.tensors["count"].tolist()
        count = counts[memory]
        earlier = counts[:memory]
        start = sum(earlier)
        end = start + count
        own = self.ids[start:end]
        share = 1 / count
        return dict.fromkeys(own, share)


class WiseExportConfig(PreTrainedConfig):
    """Names this file; the settings of the model are those in the folder `base`."""

    model_type = "mmedit-wise"


class WiseExport(Loader):
    """Loads the base model and puts the edits on it; there are no instances."""

    config_class = WiseExportConfig
    edits_class = WiseEdits


# the names that every export has
EditedConfig = WiseExportConfig
EditedModel = WiseExport
