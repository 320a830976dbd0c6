"""The networks of MEND: what turns the factors of a gradient into those of an edit (Mitchell et al. 2022, section 3).

Matrices of one shape share a network, and are told apart in it by a gain and a shift of their own. n rows (tokens),
I and O the widths of what enters and leaves a matrix, M matrices of one shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from mmedit_cli.knowledge.methods.shared.answer_rows import AnswerRows
from mmedit_cli.knowledge.methods.shared.running_moments import RunningMoments

_TINY = 1e-7  # beside a standard deviation, as published
_PARTS = ("inputs", "gradients")


class Residual(nn.Module):
    """One low-rank layer, z + max(0, gain (U V z + b) + shift).

    At first it changes nothing, as U, b and shift are 0.
    """

    def __init__(self, width: int, rank: int, matrices: int) -> None:
        super().__init__()
        rank = min(rank, width)
        u = torch.zeros(width, rank)
        v = torch.randn(rank, width)
        bias = torch.zeros(width)
        gain = torch.ones(
            matrices,
            width,
        )
        shift = torch.zeros(
            matrices,
            width,
        )
        self.u = nn.Parameter(u)
        self.v = nn.Parameter(v)
        self.bias = nn.Parameter(bias)
        self.gain = nn.Parameter(gain)
        self.shift = nn.Parameter(shift)

    def forward(self, rows: Tensor, matrix: int) -> Tensor:
        """(n, I + O) of the matrix of that number -> (n, I + O)."""
        low = rows @ self.v.T
        inner = low @ self.u.T
        inner = inner + self.bias
        gain = self.gain[matrix]
        shift = self.shift[matrix]
        scaled = gain * inner + shift
        # unlike that of relu, its gradient is not lost where it is just 0, as everywhere at first
        added = scaled.clamp(min=0)
        return rows + added


class Normalizer(nn.Module):
    """The mean and standard deviation of what enters a network, counted before the training and then kept.

    They are buffers: published code counts in plain attributes, and begins again after loading.
    """

    count: Tensor

    def __init__(self, entering: int, leaving: int) -> None:
        super().__init__()
        nothing = torch.zeros(())
        self.register_buffer("count", nothing)
        widths = (entering, leaving)
        for part, width in zip(_PARTS, widths, strict=True):
            mean = torch.zeros(width)
            deviation = torch.ones(width)
            self.register_buffer(f"{part}_mean", mean)
            self.register_buffer(
                f"{part}_deviation",
                deviation,
            )

    def set_(self, inputs: RunningMoments, gradients: RunningMoments) -> None:
        """Take over what was counted."""
        self.count.fill_(inputs.count)
        for part, moments in zip(_PARTS, (inputs, gradients), strict=True):
            mean = self.get_buffer(f"{part}_mean")
            deviation = self.get_buffer(f"{part}_deviation")
            mean.copy_(moments.mean)
            deviation.copy_(moments.deviation)

    @property
    def has_counted(self) -> bool:
        """Whether it has seen rows; before, it leaves them as they are."""
        return bool(self.count > 0)

    def forward(self, rows: AnswerRows) -> Tensor:
        """Return inputs and gradients side by side, each column with mean 0 and deviation 1: (n, I + O).

        Columns that never varied are 0: a neuron that was never active says nothing yet.
        """
        if not self.has_counted:
            return torch.cat((rows.inputs, rows.gradients), 1)
        inputs = self._normalized("inputs", rows.inputs)
        gradients = self._normalized(
            "gradients",
            rows.gradients,
        )
        return torch.cat((inputs, gradients), 1)

    def _normalized(self, part: str, rows: Tensor) -> Tensor:
        mean = self.get_buffer(f"{part}_mean")
        deviation = self.get_buffer(f"{part}_deviation")
        centred = rows - mean
        scaled = centred / (deviation + _TINY)
        varies = deviation > 0
        nothing = torch.zeros_like(scaled)
        return scaled.where(
            varies,
            nothing,
        )


class Transform(nn.Module):
    """The network of all matrices of one shape."""

    def __init__(
        self, entering: int, leaving: int, matrices: int, rank: int, depth: int
    ) -> None:
        super().__init__()
        width = entering + leaving
        self.widths = [entering, leaving]
        self.normalizer = Normalizer(entering, leaving)
        layers = [
            Residual(
                width,
                rank,
                matrices,
            )
            for _ in range(depth)
        ]
        self.layers = nn.ModuleList(layers)

    def forward(self, rows: AnswerRows, matrix: int) -> AnswerRows:
        """Return the rows that take the place of those of a gradient."""
        both = self.normalizer(rows)
        for layer in self.layers:
            both = layer(both, matrix)
        inputs, gradients = torch.split(
            both,
            self.widths,
            1,
        )
        return AnswerRows(inputs, gradients)


class MendNetworks(nn.Module):
    """The networks of all edited matrices, and the length of the step that each matrix takes.

    A step goes down the gradient, as the sign is written into the change; the published one goes up at first, and
    has to learn to turn around. A step length may become negative in training.
    """

    pace: Tensor

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        *,
        rank: int,
        depth: int,
        step_size: float,
        pace: float,
    ) -> None:
        super().__init__()
        by_shape: dict[tuple[int, int], list[str]] = {}
        for path, shape in shapes.items():
            by_shape.setdefault(shape, []).append(path)
        self._places: dict[str, tuple[str, int]] = {}
        self.transforms = nn.ModuleDict()
        for shape, paths in by_shape.items():
            entering, leaving = shape
            key = f"{entering}x{leaving}"
            self.transforms[key] = Transform(
                entering,
                leaving,
                len(paths),
                rank,
                depth,
            )
            for number, path in enumerate(paths):
                self._places[path] = (key, number)
        self._numbers = {path: number for number, path in enumerate(shapes)}
        # an optimizer moves them as far as any weight: so they are kept in a larger unit
        self.register_buffer(
            "pace",
            torch.tensor(pace),
        )
        step_sizes = torch.full(
            (len(shapes),),
            step_size / pace,
        )
        self.step_sizes = nn.Parameter(step_sizes)

    def count(self, requests: Iterable[Sequence[Mapping[str, AnswerRows]]]) -> None:
        """Let the normalisers see the rows of all requests that are trained on, by path."""
        moments: dict[str, list[RunningMoments]] = {}
        device = self.step_sizes.device
        for key, transform in self.transforms.items():
            assert isinstance(transform, Transform)
            moments[key] = []
            for width in transform.widths:
                empty = RunningMoments.empty(
                    width,
                    device,
                )
                moments[key].append(empty)
        for by_path in chain.from_iterable(requests):
            for path, found in by_path.items():
                key, _ = self._places[path]
                inputs, gradients = moments[key]
                present = nonzero(found)
                inputs.add(present.inputs)
                gradients.add(present.gradients)
        for key, (inputs, gradients) in moments.items():
            transform = self.transforms[key]
            assert isinstance(transform, Transform)
            transform.normalizer.set_(
                inputs,
                gradients,
            )

    def forward(self, path: str, rows: AnswerRows) -> AnswerRows:
        """Return what takes the place of the rows of one matrix, with its step in the gradients: (n, I), (n, O)."""
        key, number = self._places[path]
        edited: AnswerRows = self.transforms[key](
            rows,
            number,
        )
        step_size = self.pace * self.step_sizes[self._numbers[path]]
        return AnswerRows(
            edited.inputs,
            -step_size * edited.gradients,
        )


def nonzero(rows: AnswerRows) -> AnswerRows:
    """Return the rows whose input and gradient are both not all zeros: those of the others change no weight."""
    inputs = rows.inputs
    gradients = rows.gradients
    reads = inputs.ne(0).any(1)
    matters = gradients.ne(0).any(1)
    kept = reads & matters
    return AnswerRows(
        inputs[kept],
        gradients[kept],
    )
