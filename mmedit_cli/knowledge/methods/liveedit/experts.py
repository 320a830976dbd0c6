"""The expert repository of LiveEdit: store, route, apply.

R queries with a picture, N experts, n of them chosen for a query at most, r their rank, D width, F
or V values of a feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256  # experts compared at a time: products of one fixed shape, so that more experts change no earlier digit
_GATHERED = 1 << 28  # bytes of expert matrices that are gathered at once


@dataclass(frozen=True)
class Routing:
    """Which experts a query uses: index (R, n) into the repository, weight (R, n), 0 where there are fewer than n."""

    index: Tensor
    weight: Tensor

    @property
    def used(self) -> Tensor:
        """(R,) bool: the queries that any expert is used for."""
        return (self.weight > 0).any(1)

    def by_expert(self) -> list[dict[int, float]]:
        """Return for each query the weights of the experts it uses, by their numbers."""
        found: list[dict[int, float]] = []
        pairs = zip(self.index.tolist(), self.weight.tolist(), strict=True)
        for index, weight in pairs:
            used = {i: w for i, w in zip(index, weight, strict=True) if w > 0}
            found.append(used)
        return found


def soft_weights(score: Tensor, keep: Tensor, *, gated: bool) -> Tensor:
    """Return the weights of the kept experts, 0 elsewhere: (R, N), (R, N) bool -> (R, N), less than 1 in sum.

    `gated`: sigmoid(score) * softmax(score over the kept), as published (`get_moe_fuse_coe`). Otherwise a softmax with
    one more choice, "no expert", whose score is 0. For a single expert both are sigmoid(score).
    """
    if not score.shape[1]:
        return score
    masked = score.masked_fill(~keep, float("-inf"))
    detached = masked.detach()
    best = detached.amax(1, keepdim=True)
    highest = best.clamp(min=0)  # also where a row keeps none
    if gated:
        keeps_any = keep.any(1, keepdim=True)
        highest = torch.where(keeps_any, best, highest)
    shares = (masked - highest).exp()
    total = shares.sum(1, keepdim=True)
    if gated:
        return score.sigmoid() * shares / total.clamp(min=1e-30)
    no_expert = (-highest).exp()
    return shares / (total + no_expert)


def adapt(
    stream: Tensor, normed: Tensor, u: Tensor, v: Tensor, weight: Tensor
) -> Tensor:
    """Return stream + sum_i weight_i relu(normed U_i^T) V_i at every position.

    stream, normed: (R, T, D); u, v: (n, r, D), or (R, n, r, D) if every row has its own; weight: (R, n). Two products,
    never a tensor of (T, n, D).
    """
    rank = u.shape[-2]
    keys = u.flatten(-3, -2)
    values = v.flatten(-3, -2)
    active = (normed @ keys.transpose(-1, -2)).relu()
    weights = weight.repeat_interleave(rank, 1)
    weighted = active * weights[:, None]
    added = weighted @ values
    return stream + added.to(stream.dtype)


class ExpertBank:
    """Experts in the order they were made, in tensors that double when full; rows can be taken out.

    `shapes` of one expert: u, v (r, D), the vision feature (V,), the prompt feature (F,).
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], device: torch.device
    ) -> None:
        self.size = 0
        self._rows = {
            name: torch.zeros(BLOCK, *shape, device=device)
            for name, shape in shapes.items()
        }
        self._hidden = torch.zeros(
            BLOCK,
            dtype=torch.bool,
            device=device,
        )

    def __len__(self) -> int:
        return self.size

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Append experts: u, v (n, r, D); vision (n, V); prompt (n, F)."""
        end = self.size + len(rows["u"])
        if end > len(self._hidden):
            full_blocks = (end - 1) // BLOCK
            room = BLOCK * 2 ** full_blocks.bit_length()
            for name, tensor in self._rows.items():
                self._rows[name] = _grown(tensor, room)
            self._hidden = _grown(self._hidden, room)
        for name, tensor in self._rows.items():
            tensor[self.size : end] = rows[name]
        self.size = end

    def clear(self) -> None:
        """Remove all experts."""
        self._hidden[:] = False
        self.size = 0

    def hide(self, position: int, hidden: bool) -> None:
        """Take an expert out of the routing, or put it back."""
        self._hidden[position] = hidden

    def tensors(self, start: int = 0) -> dict[str, Tensor]:
        """Return the experts from position `start` on, each tensor with N - start rows."""
        return {
            name: tensor[start : self.size].clone()
            for name, tensor in self._rows.items()
        }

    def compare(self, name: str, similarity: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the similarity of queries with all experts, given that with a block of features: (R, N).

        `name` is vision or prompt; the block: (BLOCK, F) -> (R, BLOCK).
        """
        rows = self._rows[name]
        columns: list[Tensor] = []
        for start in range(0, max(1, self.size), BLOCK):
            block = rows[start : start + BLOCK]
            columns.append(similarity(block))
        every = torch.cat(columns, 1)
        return every[:, : self.size]

    @property
    def visible(self) -> Tensor:
        """(N,) bool: the experts that take part in the routing."""
        return ~self._hidden[: self.size]

    def apply(self, stream: Tensor, normed: Tensor, routing: Routing) -> Tensor:
        """Return the stream with the chosen experts added: (R, T, D); rows without an expert stay bit for bit."""
        used = routing.used.nonzero()[:, 0]
        if not len(used):
            return stream
        out = stream.clone()
        for rows in self._portions(used, routing.index.shape[1]):
            index = routing.index[rows]
            out[rows] = adapt(
                stream[rows],
                normed[rows],
                u=self._rows["u"][index],
                v=self._rows["v"][index],
                weight=routing.weight[rows],
            )
        return out

    def _portions(self, rows: Tensor, n: int) -> Iterator[Tensor]:
        """Yield rows in portions whose experts, n each, fit into `_GATHERED` bytes."""
        u = self._rows["u"]
        bytes_of_matrix = u[0].numel() * u.element_size()
        bytes_of_row = 2 * n * bytes_of_matrix
        size = max(1, _GATHERED // bytes_of_row)
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def choose(keep: Tensor, score: Tensor, top_k: int | None, *, gated: bool) -> Routing:
    """Return the kept experts, at most the best `top_k` of them, with their soft weights: (R, N), (R, N) -> Routing.

    The weights are computed from the kept experts alone, so the others change no digit.
    """
    if top_k is not None and keep.shape[1] > top_k:
        masked = score.masked_fill(~keep, float("-inf"))
        best = masked.topk(top_k, dim=1).indices
        is_best = torch.zeros_like(keep).scatter(1, best, True)
        keep = is_best & keep
    kept_first = keep.to(torch.int8).argsort(
        dim=1,
        descending=True,
        stable=True,
    )
    most = int(keep.sum(1).max())
    index = kept_first[:, :most]
    weight = soft_weights(
        score.gather(1, index),
        keep.gather(1, index),
        gated=gated,
    )
    return Routing(index, weight)


def _grown(tensor: Tensor, room: int) -> Tensor:
    larger = tensor.new_zeros(room, *tensor.shape[1:])
    larger[: len(tensor)] = tensor
    return larger
