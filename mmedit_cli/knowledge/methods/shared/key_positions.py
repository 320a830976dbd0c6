"""Where keys are read: behind the picture, at the end of the subject, or of the question, and in the answer.

The key of a question decides the first token of the answer, and the others only as far as the layers above can read
them from it. A key for each token of the answer that is fed decides those as well.
"""

from __future__ import annotations

import re
from typing import Literal

import torch
from torch import Tensor

from mmedit_cli.errors import DataError
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.batch import Batch

Position = Literal["subject", "last-image", "last-prompt"]
# facts come without a marked subject: it is taken to end with the last word that is none of these
_FUNCTION_WORDS = frozenset(
    """
    a an and answer are at be been by did do does for from had has have how in into is it its of on or please short
    shown that the their this to was were what when where which who whom whose why will with
    """.split()  # noqa: SIM905
)
_WORD = re.compile(r"[^\W_]+")


def key_places(
    backbone: VisionLanguageModel, batch: Batch, position: Position, said: Tensor
) -> Tensor:
    """Return the places of all keys of each row: the one in the question, and where `said` in the answer: (B, T) bool.

    said: (B, T) bool, the positions from which the tokens of the answer are predicted.
    """
    places = said & batch.answer_mask
    ends = key_positions(
        backbone,
        batch,
        position,
    )
    return places.scatter(1, ends[:, None], True)


def key_positions(
    backbone: VisionLanguageModel, batch: Batch, position: Position
) -> Tensor:
    """Return the position of the key in the question of each row: (B,).

    Raises DataError for a question without a picture where the key is read behind it.
    """
    if position == "last-image":
        for query in batch.queries:
            if query.image is None:
                raise DataError(
                    f"{query.prompt!r}: position last-image needs a picture",
                    "--set position=last-prompt reads the key at the end of the question",
                )
        return _last(batch.image_mask)
    if position == "last-prompt":
        return _last(batch.prompt_mask)
    rows = [_end_of_subject(backbone, batch, row) for row in range(len(batch.queries))]
    return torch.tensor(rows, device=batch.input_ids.device)


def _last(mask: Tensor) -> Tensor:
    """Return the last position of each row of a mask (B, T)."""
    numbers = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, numbers, -1).amax(1)


def _end_of_subject(backbone: VisionLanguageModel, batch: Batch, row: int) -> int:
    """Return the position of the token with which the subject of a question ends."""
    places = batch.prompt_mask[row].nonzero()[:, 0].tolist()
    ids = batch.input_ids[row, places].tolist()
    text = backbone.tokenizer.decode(ids, skip_special_tokens=False)
    words = [
        found
        for found in _WORD.finditer(text)
        if found.group().lower() not in _FUNCTION_WORDS
    ]
    if not words:
        return int(places[-1])
    end = words[-1].end()
    for count in range(1, len(ids)):
        so_far = backbone.tokenizer.decode(ids[:count], skip_special_tokens=False)
        if len(so_far) >= end:
            return int(places[count - 1])
    return int(places[-1])
