"""Training of LoRA blocks: many at once, each on its own requests, each until it knows them.

K blocks (one a group of requests), T tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmedit_cli.errors import MmeditError
from mmedit_cli.knowledge.methods.shared.lora_blocks import Blocks
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.batch import Prefix
from mmedit_cli.runtime import generator
from mmedit_cli.types import Query

# rows of a pass have these blocks, by number
Using = Callable[[Blocks, Tensor], AbstractContextManager[None]]


def train_blocks(
    backbone: VisionLanguageModel,
    layer: int,
    groups: Sequence[Sequence[Query]],
    start: Blocks,
    using: Using,
    hp: Any,
) -> tuple[Blocks, list[tuple[int, float]]]:
    """Return the trained blocks, and for each the steps it took and the last loss that was seen.

    Blocks share nothing, so each pass trains all of them. A block whose loss is below `hp.stop_loss` is finished, and
    its rows leave the batch. The layers below `layer` run once.
    """
    requests: list[Query] = []
    owners: list[int] = []  # of each request the number of its block
    for number, group in enumerate(groups):
        requests += group
        owners += [number] * len(group)
    device = backbone.device
    owner = torch.tensor(owners, device=device)
    with torch.no_grad():
        batch = backbone.batch(requests)
        prefix = backbone.prefix(batch, layer)
    blocks = Blocks(_trainable(start.a, device), _trainable(start.b, device))
    done = blocks.detached()
    optimizer = torch.optim.AdamW(
        blocks.parameters(),
        lr=hp.learning_rate,
        weight_decay=hp.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.StepLR(
        optimizer,
        hp.decay_every,
        hp.decay,
    )
    course = [(hp.steps, 0.0)] * len(groups)  # (steps, loss) of each
    active = set(range(len(groups)))
    rows = torch.arange(len(requests))
    part = prefix
    for step in range(hp.steps):
        with using(blocks, owner[rows]):
            noisy = _jittered(part, hp.jitter, step) if hp.jitter else part
            losses = _losses(
                backbone,
                noisy,
                owner[rows],
                len(groups),
                teach_end=hp.teach_end,
            )
        values = losses.tolist()
        finished = _below(hp.stop_loss, active, values)
        for number in active:
            steps = step if number in finished else hp.steps
            course[number] = (steps, values[number])
        for number in finished:
            done.write(number, blocks)
        active -= finished
        if not active:
            return done, course
        if finished:
            left = [row for row, number in enumerate(owners) if number in active]
            rows = torch.tensor(left)
            part = backbone.select(prefix, left)
        optimizer.zero_grad()
        losses[sorted(active)].sum().backward()
        optimizer.step()
        schedule.step()
    for number in active:
        done.write(number, blocks)
    return done, course


def _below(bound: float | None, active: set[int], losses: Sequence[float]) -> set[int]:
    """Return the active blocks whose loss is below the bound."""
    if bound is None:
        return set()
    return {number for number in active if losses[number] < bound}


def _losses(
    backbone: VisionLanguageModel,
    prefix: Prefix,
    owner: Tensor,
    n: int,
    *,
    teach_end: bool,
) -> Tensor:
    """Return the mean cross entropy over the answer tokens of each block's rows: (n,), 0 for a block without rows."""
    batch = prefix.batch
    at, right = batch.target_positions(backbone.end_id, with_end=teach_end)
    with torch.enable_grad():
        logits = backbone.resume(prefix, at=at)
        token_losses = F.cross_entropy(
            logits.float(),
            right[at],
            reduction="none",
        )
    row = at.nonzero()[:, 0]
    block = owner[row]
    tokens = torch.bincount(block, minlength=n).clamp(min=1)
    zeros = torch.zeros(n, device=token_losses.device)
    losses = zeros.index_add(0, block, token_losses) / tokens
    if not bool(losses.isfinite().all()):
        raise MmeditError(
            f"the loss of an edit became {losses.sum().item()}", "lower learning_rate"
        )
    return losses


def _jittered(prefix: Prefix, size: float, step: int) -> Prefix:
    """Return the prefix with noise of `size` times the root mean square of each state added; the same for all rows."""
    hidden = prefix.hidden
    source = generator(step)
    noise = torch.randn(hidden.shape[1:], generator=source)
    noise = noise.to(hidden)
    squares = hidden.float().square()
    root_mean_square = squares.mean(-1, keepdim=True).sqrt()
    scale = size * root_mean_square.to(hidden)
    noisy = hidden + scale * noise
    return replace(prefix, hidden=noisy)


def _trainable(
    tensors: Mapping[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    return {
        name: tensor.to(device, copy=True).requires_grad_()
        for name, tensor in tensors.items()
    }
