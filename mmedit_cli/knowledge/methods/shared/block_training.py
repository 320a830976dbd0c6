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

Using = Callable[
    [Blocks, Tensor], AbstractContextManager[None]
]  # rows of a pass have these blocks, by number


def train_blocks(
    backbone: VisionLanguageModel,
    layer: int,
    groups: Sequence[Sequence[Query]],
    start: Blocks,
    using: Using,
    hp: Any,
) -> tuple[Blocks, list[tuple[int, float]]]:
    """Return the trained blocks, and for each the steps it took and the last loss that was seen.

    Blocks share nothing, so all are trained in one pass after the other over all rows; one whose loss is below
    `hp.stop_loss` is finished and its rows leave. What lies below `layer` is computed once.
    """
    requests = [request for group in groups for request in group]
    owner = torch.tensor(
        [i for i, group in enumerate(groups) for _ in group], device=backbone.device
    )
    with torch.no_grad():
        prefix = backbone.prefix(backbone.batch(requests), layer)
    blocks = Blocks(
        _trainable(start.a, backbone.device), _trainable(start.b, backbone.device)
    )
    done = blocks.detached()
    optimizer = torch.optim.AdamW(
        blocks.parameters(), lr=hp.learning_rate, weight_decay=hp.weight_decay
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, hp.decay_every, hp.decay)
    told = [(hp.steps, 0.0)] * len(groups)
    active, rows = set(range(len(groups))), torch.arange(len(requests))
    part = prefix
    for step in range(hp.steps):
        with using(blocks, owner[rows]):
            noisy = part if not hp.jitter else _jittered(part, hp.jitter, step)
            losses = _losses(
                backbone, noisy, owner[rows], len(groups), teach_end=hp.teach_end
            )
        values = losses.tolist()
        finished = {
            i for i in active if hp.stop_loss is not None and values[i] < hp.stop_loss
        }
        for i in active:
            told[i] = (step if i in finished else hp.steps, values[i])
        for i in finished:
            done.write(i, blocks)
        active -= finished
        if not active:
            return done, told
        if finished:
            rows = torch.tensor(
                [row for row, i in enumerate(owner.tolist()) if i in active]
            )
            part = backbone.select(prefix, rows.tolist())
        optimizer.zero_grad()
        losses[sorted(active)].sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    for i in active:
        done.write(i, blocks)
    return done, told


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
    at, right = batch.target_positions(backbone.end_id)
    if not teach_end:
        at = batch.predicting
    with torch.enable_grad():
        each = F.cross_entropy(
            backbone.resume(prefix, at=at).float(), right[at], reduction="none"
        )
    belongs = owner[at.nonzero()[:, 0]]
    tokens = torch.bincount(belongs, minlength=n).clamp(min=1)
    losses = torch.zeros(n, device=each.device).index_add(0, belongs, each) / tokens
    if not bool(losses.isfinite().all()):
        raise MmeditError(
            f"the loss of an edit became {losses.sum().item()}", "lower learning_rate"
        )
    return losses


def _jittered(prefix: Prefix, size: float, step: int) -> Prefix:
    """Return the prefix with noise of `size` times the root mean square of each state added; the same for all rows."""
    hidden = prefix.hidden
    noise = torch.randn(hidden.shape[1:], generator=generator(step)).to(hidden)
    rms = hidden.float().square().mean(-1, keepdim=True).sqrt().to(hidden)
    return replace(prefix, hidden=hidden + size * rms * noise)


def _trainable(
    tensors: Mapping[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    return {
        name: tensor.to(device, copy=True).requires_grad_()
        for name, tensor in tensors.items()
    }
