"""How the networks of MEND are trained: cases that are edited together, and what is asked about them afterwards.

The gradient of a request belongs to the untouched model, which is frozen: its rows are computed once. G groups of
cases that are edited together, R queries about them, T tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mmedit_cli.knowledge.methods.mend.gradients import (
    Aggregation,
    RowsByPath,
    changes,
    request_rows,
)
from mmedit_cli.knowledge.methods.mend.hparams import MendTraining
from mmedit_cli.knowledge.methods.mend.networks import MendNetworks
from mmedit_cli.knowledge.methods.shared.answer_rows import AnswerRows
from mmedit_cli.knowledge.methods.shared.chunks import chunks
from mmedit_cli.knowledge.methods.shared.draws import one_of
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.anchors import sizes
from mmedit_cli.knowledge.models.shared.batch import Prefix
from mmedit_cli.knowledge.models.shared.prefix import RowCache
from mmedit_cli.patch import Patch
from mmedit_cli.types import EditCase, Query

_GROUP = 16  # requests of one backward pass
_BUDGET = 1 << 30  # bytes of rows in memory; the rest goes to disk


class FrozenRows:
    """The rows of requests on the untouched model, each computed once, and in fixed company."""

    def __init__(
        self,
        backbone: VisionLanguageModel,
        layer: int,
        paths: Sequence[str],
        *,
        teach_end: bool,
    ) -> None:
        self._backbone = backbone
        self._layer = layer
        self._paths = paths
        self._teach_end = teach_end
        self._widths: list[int] = []
        for path in paths:
            self._widths += sizes(backbone.model.get_submodule(path))
        self._cache: RowCache[Query] = RowCache(
            self._compute,
            group=_GROUP,
            budget=_BUDGET,
            spill=True,
        )

    def plan(self, requests: Sequence[Query]) -> None:
        """Fix in which company these requests are computed."""
        by_length = self._backbone.by_length(requests)
        self._cache.plan(by_length)

    def of(self, requests: Sequence[Query]) -> list[RowsByPath]:
        """Return the rows of each request by path; one that was not planned is computed alone."""
        for request in requests:
            self._cache.plan([request])
        packed = self._cache.get(requests)
        device = self._backbone.device
        return [self._unpacked(rows.to(device)) for rows in packed]

    def _compute(self, requests: Sequence[Query]) -> list[Tensor]:
        found, _ = request_rows(
            self._backbone,
            requests,
            self._layer,
            self._paths,
            teach_end=self._teach_end,
        )
        packed = []
        for by_path in found:
            parts: list[Tensor] = []
            for path in self._paths:
                rows = by_path[path]
                parts += (rows.inputs, rows.gradients)
            packed.append(torch.cat(parts, 1))
        return packed

    def _unpacked(self, packed: Tensor) -> RowsByPath:
        parts = torch.split(packed, self._widths, 1)
        inputs = parts[::2]
        gradients = parts[1::2]
        rows = {}
        for path, entering, leaving in zip(
            self._paths,
            inputs,
            gradients,
            strict=True,
        ):
            rows[path] = AnswerRows(entering, leaving)
        return rows


@dataclass(frozen=True)
class Asked:
    """What is asked about edited cases: queries, the group of each, and the column it belongs to."""

    queries: list[Query]
    groups: list[int]
    columns: list[str]

    def of_groups(self, chosen: Sequence[int]) -> Asked:
        """Return what is asked about some groups, which are then counted from 0."""
        place = {group: number for number, group in enumerate(chosen)}
        queries = []
        groups = []
        columns = []
        for i, group in enumerate(self.groups):
            if group not in place:
                continue
            queries.append(self.queries[i])
            groups.append(place[group])
            columns.append(self.columns[i])
        return Asked(
            queries,
            groups,
            columns,
        )


def choose(
    groups: Sequence[Sequence[EditCase]], source: Generator, *, reliability: bool
) -> Asked:
    """Draw one query from each column of generality and of locality of each case.

    The request itself is asked only with `reliability`, or where a case has no generality: it has been used by then.
    """
    asked = Asked([], [], [])
    for group, cases in enumerate(groups):
        for case in cases:
            for column, queries in _columns(case, reliability=reliability):
                asked.queries.append(one_of(queries, source))
                asked.groups.append(group)
                asked.columns.append(column)
    return asked


def _columns(
    case: EditCase, *, reliability: bool
) -> Iterator[tuple[str, tuple[Query, ...]]]:
    asks_request = reliability or not any(case.generality.values())
    for column, queries in case.columns():
        family = column.partition(".")[0]
        wanted = family in ("generality", "locality")
        if family == "reliability":
            wanted = asks_request
        if wanted and queries:
            yield column, queries


def losses_of(
    networks: MendNetworks,
    frozen: FrozenRows,
    place: Place,
    groups: Sequence[Sequence[EditCase]],
    asked: Asked,
    others: Sequence[EditCase] = (),
) -> dict[str, Tensor]:
    """Return the loss of each column, the mean over its queries, and `total`, their weighted sum.

    `others` are edited beside every group, and nothing is asked about them. Each of several processes edits and asks
    its share of the groups.
    """
    share = list(
        range(
            place.rank,
            len(groups),
            place.world,
        )
    )
    nothing = networks.step_sizes.sum() * 0.0
    counts = Counter(asked.columns)
    losses = dict.fromkeys(counts, nothing)
    own = asked.of_groups(share)
    if own.queries:
        edited = []
        for group in share:
            cases = (*groups[group], *others)
            requests = [case.request for case in cases]
            rows = frozen.of(requests)
            edited.append(
                changes(
                    networks,
                    rows,
                    place.aggregation,
                )
            )
        each = _query_losses(place, edited, own)
        for loss, column in zip(each, own.columns, strict=True):
            losses[column] = losses[column] + loss / counts[column]
    total = nothing
    for column, loss in losses.items():
        total = total + place.weight(column) * loss
    return {**losses, "total": total}


@dataclass(frozen=True)
class Place:
    """Where networks are trained: the model, its lowest edited layer, what is taught, and which process this is."""

    backbone: VisionLanguageModel
    layer: int
    aggregation: Aggregation
    training: MendTraining
    teach_end: bool
    rank: int = 0
    world: int = 1

    def weight(self, column: str) -> float:
        """Return how much a column counts."""
        family = column.partition(".")[0]
        if family == "locality":
            return self.training.locality
        if family == "reliability":
            # where it stands in for generality, which the case lacks, it counts as much
            return self.training.reliability or self.training.generality
        return self.training.generality


def _query_losses(
    place: Place, edited: Sequence[Mapping[str, Tensor]], asked: Asked
) -> Tensor:
    """Return the loss of each query on the model that its group has edited: (R,).

    Cross entropy where an edit is to answer, KL(untouched || edited) where nothing is to change.
    """
    backbone = place.backbone
    with torch.no_grad():
        batch = backbone.batch(asked.queries)
        prefix = backbone.prefix(batch, place.layer)
    at, labels = batch.target_positions(backbone.end_id, with_end=place.teach_end)
    is_local = [column.startswith("locality") for column in asked.columns]
    rows = torch.tensor(is_local, device=at.device)
    at_local = at & rows[:, None]
    with changed(backbone, edited, asked.groups):
        logits = backbone.resume(prefix, at).float()
    local = at_local[at]
    token_losses = F.cross_entropy(
        logits,
        labels[at],
        reduction="none",
    )
    if any(is_local):
        shift = _divergence(
            backbone,
            prefix,
            at_local,
            logits[local],
        )
        token_losses = token_losses.masked_scatter(local, shift)
    row = at.nonzero()[:, 0]
    zeros = torch.zeros(len(at), device=at.device)
    sums = zeros.index_add(0, row, token_losses)
    return sums / at.sum(1)


def _divergence(
    backbone: VisionLanguageModel, prefix: Prefix, at: Tensor, edited: Tensor
) -> Tensor:
    """Return KL(untouched || edited) at each position of `at`, from the logits (n, V) of the edited model: (n,)."""
    with torch.no_grad():
        untouched = backbone.resume(prefix, at).float()
    by_word = F.kl_div(
        edited.log_softmax(-1),
        untouched.log_softmax(-1),
        log_target=True,
        reduction="none",
    )
    return by_word.sum(-1)


@contextmanager
def changed(
    backbone: VisionLanguageModel,
    edited: Sequence[Mapping[str, Tensor]],
    groups: Sequence[int],
) -> Iterator[None]:
    """Inside the block, row r of a batch is answered with the changes (I, O) of its group, which keep their gradients.

    What a matrix adds to its output is x times the change, so no weight is touched.
    """
    rows_of_group = _rows_by_group(
        groups,
        len(edited),
    )
    with Patch(backbone.model) as patch:
        for path in edited[0]:
            own = [of_group[path] for of_group in edited]
            adds = _adding(own, rows_of_group)
            patch.hook_call(path, adds)
        yield


def _rows_by_group(groups: Sequence[int], count: int) -> list[list[int]]:
    """Return the rows of a batch that belong to each group."""
    found: list[list[int]] = [[] for _ in range(count)]
    for row, group in enumerate(groups):
        found[group].append(row)
    return found


def _adding(
    edited: Sequence[Tensor], rows_of_group: Sequence[Sequence[int]]
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what adds the change (I, O) of each group to the output of a matrix for the rows of that group."""
    count = sum(map(len, rows_of_group))

    def add(entering: Tensor, leaving: Tensor) -> Tensor:
        # OPT gives its FFN one row for all tokens of a batch
        width = entering.shape[-1]
        by_row = entering.reshape(count, -1, width)
        shape = (
            count,
            -1,
            leaving.shape[-1],
        )
        outputs = leaving.reshape(shape)
        for change, rows in zip(edited, rows_of_group, strict=True):
            where = torch.tensor(
                rows,
                device=outputs.device,
            )
            own = by_row[where]
            change = change.to(own.dtype)
            added = own @ change
            outputs = outputs.index_add(0, where, added)
        return outputs.reshape(leaving.shape)

    return add


def in_groups(cases: Sequence[EditCase], together: int) -> list[Sequence[EditCase]]:
    """Return the cases of a batch as groups of cases that are edited together."""
    return list(chunks(cases, together))
