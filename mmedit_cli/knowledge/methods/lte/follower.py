"""The follower of LTE: a LoRA that is on for the questions with a fact in front, and for no others.

B rows, T tokens, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from mmedit_cli.knowledge.methods.lte.hparams import LteHparams
from mmedit_cli.knowledge.methods.shared.scope import Scope
from mmedit_cli.patch import Patch


class Follower(nn.Module):
    """Two small matrices for each linear layer; the second is 0 at first, so that nothing changes yet."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], rank: int, alpha: float
    ) -> None:
        super().__init__()
        self.paths = list(shapes)
        self.scale = alpha / rank
        self.downs = nn.ParameterList()
        self.ups = nn.ParameterList()
        for entering, leaving in shapes.values():
            down = torch.randn(entering, rank) * entering**-0.5
            up = torch.zeros(rank, leaving)
            self.downs.append(nn.Parameter(down))
            self.ups.append(nn.Parameter(up))

    def added(
        self, number: int, entering: Tensor, leaving: Tensor, rows: Tensor
    ) -> Tensor:
        """Return what a layer says (B, T, O) from what it reads (B, T, I), with the follower on in some rows (n,)."""
        own = entering[rows].float()
        read = own @ self.downs[number]
        written = read @ self.ups[number]
        change = self.scale * written
        change = change.to(leaving.dtype)
        return leaving.index_add(
            0,
            rows,
            change,
        )

    def hook(self, patch: Patch, rows_of: Callable[[], Tensor]) -> None:
        """Put the follower on its layers; `rows_of` says for which rows of the batch in the forward pass it is on."""

        def change(number: int, entering: Tensor, leaving: Tensor) -> Tensor | None:
            rows = rows_of()
            if not len(rows):
                return None
            return self.added(
                number,
                entering,
                leaving,
                rows,
            )

        for number, path in enumerate(self.paths):
            patch.hook_call(
                path,
                partial(change, number),
            )

    @contextmanager
    def on(self, model: nn.Module, rows: Tensor) -> Iterator[None]:
        """Inside the block, the follower is on for these rows."""
        with Patch(model) as patch:
            self.hook(patch, lambda: rows)
            yield


class LteNetworks(nn.Module):
    """What retrieves a fact, and what follows it."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        entry_width: int,
        hparams: LteHparams,
    ) -> None:
        super().__init__()
        self.scope = Scope(
            entry_width,
            hparams.hidden_dim,
            hparams.prompt_dim,
            hparams.detail_dim,
        )
        self.follower = Follower(
            shapes,
            hparams.rank,
            hparams.alpha,
        )
