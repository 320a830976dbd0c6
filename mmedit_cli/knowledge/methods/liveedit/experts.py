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
        """(R,) bool: the queries that any expert touches."""
        return (self.weight > 0).any(1)


def soft_weights(score: Tensor, keep: Tensor, *, gated: bool) -> Tensor:
    """Return the weights of the kept experts, 0 elsewhere: (R, N), (R, N) bool -> (R, N), less than 1 in sum.

    `gated`, as published: sigmoid(score) * softmax(score over the kept). Else a softmax in which "no expert" has the
    score 0 and takes part. For a single expert both are sigmoid(score).
    """
    if not score.shape[1]:
        return score
    masked = score.masked_fill(~keep, float("-inf"))
    highest = (
        masked.detach().amax(1, keepdim=True).clamp(min=0)
    )  # also where a row keeps none
    if gated:
        highest = torch.where(
            keep.any(1, keepdim=True), masked.detach().amax(1, keepdim=True), highest
        )
    shares = (masked - highest).exp()
    total = shares.sum(1, keepdim=True)
    if gated:
        return score.sigmoid() * shares / total.clamp(min=1e-30)
    return shares / (total + (-highest).exp())


def adapt(
    stream: Tensor, normed: Tensor, u: Tensor, v: Tensor, weight: Tensor
) -> Tensor:
    """Return stream + sum_i weight_i relu(normed U_i^T) V_i at every position.

    stream, normed: (R, T, D); u, v: (n, r, D), or (R, n, r, D) if every row has its own; weight: (R, n). Two products,
    never a tensor of (T, n, D).
    """
    active = (
        normed @ u.flatten(-3, -2).transpose(-1, -2)
    ).relu() * weight.repeat_interleave(u.shape[-2], 1)[:, None]
    return stream + (active @ v.flatten(-3, -2)).to(stream.dtype)


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
        self._hidden = torch.zeros(BLOCK, dtype=torch.bool, device=device)

    def __len__(self) -> int:
        return self.size

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Append experts: u, v (n, r, D); vision (n, V); prompt (n, F)."""
        end = self.size + len(rows["u"])
        if end > len(self._hidden):
            room = BLOCK * (2 ** ((end - 1) // BLOCK).bit_length())
            self._rows = {
                name: _grown(tensor, room) for name, tensor in self._rows.items()
            }
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
        blocks = self._rows[name][: -(-self.size // BLOCK) * BLOCK].split(BLOCK)
        return torch.cat([similarity(block) for block in blocks], 1)[:, : self.size]

    @property
    def visible(self) -> Tensor:
        """(N,) bool: the experts that take part in the routing."""
        return ~self._hidden[: self.size]

    def apply(self, stream: Tensor, normed: Tensor, routing: Routing) -> Tensor:
        """Return the stream with the chosen experts added: (R, T, D); what no expert touches stays bit for bit."""
        used = routing.used.nonzero()[:, 0]
        if not len(used):
            return stream
        out = stream.clone()
        for rows in self._portions(used, routing.index.shape[1]):
            index = routing.index[rows]
            u, v = self._rows["u"][index], self._rows["v"][index]
            out[rows] = adapt(stream[rows], normed[rows], u, v, routing.weight[rows])
        return out

    def _portions(self, rows: Tensor, n: int) -> Iterator[Tensor]:
        each = 2 * n * self._rows["u"][0].numel() * self._rows["u"].element_size()
        yield from rows.split(max(1, _GATHERED // each))


def choose(keep: Tensor, score: Tensor, top_k: int | None, *, gated: bool) -> Routing:
    """Return the kept experts, at most the best `top_k` of them, with their soft weights: (R, N), (R, N) -> Routing.

    The weights are computed on the kept alone: an expert that is not kept changes no digit.
    """
    if top_k is not None and keep.shape[1] > top_k:
        best = score.masked_fill(~keep, float("-inf")).topk(top_k, dim=1).indices
        keep = torch.zeros_like(keep).scatter(1, best, True) & keep
    index = keep.to(torch.int8).argsort(dim=1, descending=True, stable=True)[
        :, : int(keep.sum(1).max())
    ]
    return Routing(
        index, soft_weights(score.gather(1, index), keep.gather(1, index), gated=gated)
    )


def _grown(tensor: Tensor, room: int) -> Tensor:
    larger = tensor.new_zeros(room, *tensor.shape[1:])
    larger[: len(tensor)] = tensor
    return larger
