"""A model with Multi-MELO's edits, on transformers alone: from_pretrained, forward, and generate with its cache.

    from transformers import AutoModelForImageTextToText
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)

or, with this file beside your own, `EditedModel.from_pretrained(FOLDER)`. What comes back is the base model, from the
folder `base`, with hooks that add the LoRA blocks of `edits.safetensors`. Which block a question has is decided from
its picture and its words (what follows the picture) when it is read first, and holds for every token generated.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig

from mmedit_cli.knowledge.methods.multi_melo.index import Keys, deepest, within_reach
from mmedit_cli.knowledge.methods.multi_melo.keys import (
    own_keys,
    state_of,
    without_picture,
)
from mmedit_cli.knowledge.methods.shared.exported_runtime import (
    Loader,
    Question,
    RoutedEdits,
)
from mmedit_cli.knowledge.methods.shared.lora_blocks import NONE, Blocks, add_blocks
from mmedit_cli.knowledge.models.shared.prefix import run_to


class MultiMeloEdits(RoutedEdits):
    """The blocks on one model; a route is the block of each row, -1 for none."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.to(torch.device("cpu"))
        for path in self.settings.linears:
            self.patch.hook_call(path, partial(self._adapt, path))

    def to(self, device: torch.device) -> None:
        """Move blocks and keys."""
        super().to(device)
        tensors = self.tensors
        linears = self.settings.linears
        a = {path: tensors[f"a.{path}"] for path in linears}
        b = {path: tensors[f"b.{path}"] for path in linears}
        self.blocks = Blocks(a, b)
        parts = {
            name.removeprefix("key."): rows
            for name, rows in tensors.items()
            if name.startswith("key.")
        }
        self.rows = Keys(parts, tensors["seen"])

    def choose(self, hidden: Tensor, question: Question) -> Tensor | None:
        """Return the block of each row, None if no row has one."""
        keys = own_keys(
            hidden,
            question.prompt,
            question.image,
            alone=partial(self._alone, question),
        )
        distance = within_reach(self.settings.reach)
        rows = deepest(
            distance(keys, self.rows),
            self.tensors["radii"],
            self.tensors["hidden"],
        )
        self.weights = []
        for row in rows.tolist():
            none = row == NONE
            self.weights.append({} if none else {self.ids[row]: 1.0})
        has_block = rows != NONE
        if not bool(has_block.any()):
            return None
        blocks = self.tensors["block"][rows]
        return torch.where(has_block, blocks, NONE)

    def _alone(self, question: Question, rows: list[int]) -> Tensor:
        """Return the states of the questions of some rows when they are read without their pictures: (n, D)."""
        wanted: list[tuple[int, ...]] = []
        for row in rows:
            tokens = without_picture(
                question.ids[row],
                question.mask[row],
                question.image[row],
                self.settings.frame,
            )
            wanted.append(tokens)
        distinct = list(dict.fromkeys(wanted))
        states = self._states_of(distinct)
        return states[[distinct.index(tokens) for tokens in wanted]]

    def _states_of(self, questions: list[tuple[int, ...]]) -> Tensor:
        """Return the states of questions that are given as tokens: (n, D)."""
        embedding = self.model.get_input_embeddings()
        device = embedding.weight.device
        rows = [torch.tensor(tokens) for tokens in questions]
        ids = pad_sequence(rows, batch_first=True).to(device)
        ones = [torch.ones_like(row) for row in rows]
        mask = pad_sequence(ones, batch_first=True).to(device)
        stack = self.model.get_submodule(self.settings.stack)
        entered = self.model.get_submodule(self.settings.entered)

        def read() -> object:
            return stack(
                inputs_embeds=embedding(ids),
                attention_mask=mask,
                use_cache=False,
            )

        hidden, _ = run_to(read, entered)
        return state_of(hidden, mask.to(hidden.device).bool())

    def _adapt(self, path: str, x: Tensor, out: Tensor) -> Tensor | None:
        """Add the blocks to what leaves a linear layer."""
        if self.route is None:
            return None
        scale = self.settings.scale
        return add_blocks(
            x,
            out,
            self.blocks,
            path,
            self.route,
            scale,
        )


class MultiMeloExportConfig(PreTrainedConfig):
    """Names this file; the settings of the model are those in the folder `base`."""

    model_type = "mmedit-multi-melo"


class MultiMeloExport(Loader):
    """Loads the base model and puts the edits on it; there are no instances."""

    config_class = MultiMeloExportConfig
    edits_class = MultiMeloEdits


# the names that every export has
EditedConfig = MultiMeloExportConfig
EditedModel = MultiMeloExport
