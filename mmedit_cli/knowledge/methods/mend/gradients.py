"""The gradient of a request as rows, and the change of a matrix that networks make of them.

n rows (tokens), I and O the widths of what enters and leaves a matrix. The gradient of a matrix is the sum over the
tokens of the outer products of both rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmedit_cli.knowledge.methods.mend.networks import MendNetworks, nonzero
from mmedit_cli.knowledge.methods.shared.answer_rows import (
    AnswerRows,
    answer_rows,
    joined,
)
from mmedit_cli.knowledge.methods.shared.ridge import ridge
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.types import Query

RowsByPath = Mapping[str, AnswerRows]


@dataclass(frozen=True)
class Aggregation:
    """How the changes of single tokens become one: added up, or by a ridge regression with the given weight.

    A sum is MEND's. The regression (MALMEN, Tan et al. 2024, section 3.2) changes each output at a token as the
    change of that token alone would, as far as the tokens agree.
    """

    penalty: float | None

    def __call__(self, inputs: Tensor, edited: AnswerRows) -> Tensor:
        """Return the change (I, O) for what enters the matrix, (n, I), and the rows that networks made."""
        if self.penalty is None:
            total: Tensor = edited.inputs.T @ edited.gradients
            return total
        alike = (inputs * edited.inputs).sum(1, keepdim=True)
        values = alike * edited.gradients
        change = ridge(
            inputs.double(),
            values.double(),
            self.penalty,
        )
        return change.float()


def request_rows(
    backbone: VisionLanguageModel,
    requests: Sequence[Query],
    layer: int,
    paths: Sequence[str],
    *,
    teach_end: bool,
) -> tuple[list[RowsByPath], float]:
    """Return the rows of each request for its own mean loss, one a token, and the mean loss of all their tokens.

    A request has the same rows in whatever company it is asked.
    """
    with torch.no_grad():
        batch = backbone.batch(requests)
        prefix = backbone.prefix(batch, layer)
    at, labels = batch.target_positions(backbone.end_id, with_end=teach_end)
    everywhere = batch.attention_mask.bool()
    found = answer_rows(
        backbone,
        prefix,
        at,
        labels[at],
        paths,
        where=everywhere,
    )
    lengths = everywhere.sum(1).tolist()
    # the loss is the mean over the tokens of all: a request alone would have a larger share in it
    shares = at.sum() / at.sum(1)
    by_request: list[dict[str, AnswerRows]] = [{} for _ in requests]
    for path, rows in found.rows.items():
        inputs = torch.split(rows.inputs.float(), lengths)
        gradients = torch.split(
            rows.gradients.float(),
            lengths,
        )
        for number, share in enumerate(shares):
            own = share * gradients[number]
            by_request[number][path] = AnswerRows(inputs[number], own)
    return list(by_request), found.loss


def changes(
    networks: MendNetworks, requests: Sequence[RowsByPath], how: Aggregation
) -> dict[str, Tensor]:
    """Return the change of each matrix that teaches all these requests: (I, O), float32, by path."""
    found = {}
    for path in requests[0]:
        together = joined([rows[path] for rows in requests])
        present = nonzero(together)
        edited = networks(path, present)
        found[path] = how(
            present.inputs,
            edited,
        )
    return found
