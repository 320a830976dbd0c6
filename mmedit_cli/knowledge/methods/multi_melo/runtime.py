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


class Edits(RoutedEdits):
    """The blocks on one model; a route is the block of each row, -1 for none."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.to(torch.device("cpu"))
        for path in self.settings.linears:
            self.patch.hook_call(path, partial(self._adapt, path))

    def to(self, device: torch.device) -> None:
        """Move blocks and keys."""
        super().to(device)
        tensors, linears = self.tensors, self.settings.linears
        self.blocks = Blocks(
            *({path: tensors[f"{side}.{path}"] for path in linears} for side in "ab")
        )
        parts = {
            name.removeprefix("key."): rows
            for name, rows in tensors.items()
            if name.startswith("key.")
        }
        self.rows = Keys(parts, tensors["seen"])

    def choose(self, hidden: Tensor, question: Question) -> Tensor | None:
        """Return the block of each row, None if no row has one."""
        keys = own_keys(
            hidden, question.prompt, question.image, partial(self._alone, question)
        )
        apart = within_reach(self.settings.reach)(keys, self.rows)
        rows = deepest(apart, self.tensors["radii"], self.tensors["hidden"])
        self.weights = [
            {} if row == NONE else {self.ids[row]: 1.0} for row in rows.tolist()
        ]
        return (
            torch.where(rows == NONE, NONE, self.tensors["block"][rows])
            if bool((rows != NONE).any())
            else None
        )

    def _alone(self, question: Question, rows: list[int]) -> Tensor:
        """Return the states of the questions of some rows when they are read without their pictures: (n, D)."""
        wanted = [
            without_picture(
                question.ids[i],
                question.mask[i],
                question.image[i],
                self.settings.frame,
            )
            for i in rows
        ]
        distinct = list(dict.fromkeys(wanted))
        ids = pad_sequence([torch.tensor(row) for row in distinct], batch_first=True)
        mask = pad_sequence(
            [torch.ones(len(row), dtype=torch.long) for row in distinct],
            batch_first=True,
        )
        embedding, stack = (
            self.model.get_input_embeddings(),
            self.model.get_submodule(self.settings.stack),
        )
        ids, mask = ids.to(embedding.weight.device), mask.to(embedding.weight.device)
        entered = self.model.get_submodule(self.settings.entered)
        hidden, _ = run_to(
            lambda: stack(
                inputs_embeds=embedding(ids), attention_mask=mask, use_cache=False
            ),
            entered,
        )
        states = state_of(hidden, mask.to(hidden.device).bool())
        return states[[distinct.index(row) for row in wanted]]

    def _adapt(self, path: str, x: Tensor, out: Tensor) -> Tensor | None:
        """Add the blocks to what leaves a linear layer."""
        return (
            None
            if self.route is None
            else add_blocks(x, out, self.blocks, path, self.route, self.settings.scale)
        )


class EditedConfig(PreTrainedConfig):
    """Names this file; the settings of the model are those in the folder `base`."""

    model_type = "mmedit-multi-melo"


class EditedModel(Loader):
    """Loads the base model and puts the edits on it; there are no instances."""

    config_class = EditedConfig
    edits_class = Edits
