"""A model with GRACE's edits, on transformers alone: from_pretrained, forward, and generate with its cache.

    from transformers import AutoModelForImageTextToText
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)

or, with this file beside your own, `EditedModel.from_pretrained(FOLDER)`. What comes back is the base model, from the
folder `base`, with hooks that put values of `edits.safetensors` in the place of what one layer computes. Which value a
question gets, if any, is decided from its last token when it is read first, and holds for every token generated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from mmedit_cli.knowledge.methods.grace.codebook import (
    NONE,
    Choice,
    distances,
    nearest,
)
from mmedit_cli.knowledge.methods.grace.site import WrappedFfn
from mmedit_cli.knowledge.methods.shared.exported_runtime import (
    Loader,
    Question,
    RoutedEdits,
)
from mmedit_cli.knowledge.methods.shared.question_end import ends_of, states_at


class GraceEdits(RoutedEdits):
    """The codebook on one model; a route is the choice of each row, made on entering the FFN."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._sequences = 1
        self._read_now: Question | None = None
        self.choice: Choice | None = None
        site = WrappedFfn(
            self.settings.ffn_entered,
            self.settings.ffn_left,
            rows=lambda: self._sequences,
        )
        site.hook(self.patch, self._decide, self._replace)

    def choose(self, hidden: Tensor, question: Question) -> None:
        """Note the question: what tells it from others is known in the middle of this layer."""
        self._read_now = question

    def change(self, hidden: Tensor) -> None:
        """Note how many sequences the pass has."""
        self._sequences = len(hidden)

    @torch.no_grad()
    def _decide(self, entering: Tensor) -> None:
        question = self._read_now
        if question is None:
            return
        self._read_now = None
        tensors = self.tensors
        ends = ends_of(question.mask)
        keys = states_at(entering, ends).float()
        apart = distances(
            keys,
            tensors["key"],
        )
        chosen = nearest(
            apart,
            tensors["radii"],
            tensors["hidden"],
        )
        self.choice = Choice(
            chosen,
            ends,
            entering.shape[1],
        )
        self.weights = []
        for row in chosen.tolist():
            none = row == NONE
            self.weights.append({} if none else {self.ids[row]: 1.0})

    def _replace(self, leaving: Tensor) -> Tensor | None:
        if self.choice is None:
            return None
        return self.choice.replace(leaving, self.tensors["value"])


class GraceExportConfig(PreTrainedConfig):
    """Names this file; the settings of the model are those in the folder `base`."""

    model_type = "mmedit-grace"


class GraceExport(Loader):
    """Loads the base model and puts the edits on it; there are no instances."""

    config_class = GraceExportConfig
    edits_class = GraceEdits


# the names that every export has
EditedConfig = GraceExportConfig
EditedModel = GraceExport
