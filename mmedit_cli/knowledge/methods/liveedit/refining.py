"""Experts of LiveEdit that do not say their answer yet are carried on by gradient, each on its own request (ours).

What a network writes in one pass is right for nearly every edit, and nearly is not enough for the one that a user
asked for: a new answer of unusual words, say. Only the experts that miss cost anything, and only the layers above.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mmedit_cli.knowledge.methods.liveedit.experts import adapt
from mmedit_cli.knowledge.methods.liveedit.networks import LiveEditNetworks
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.batch import Prefix

_RATE = 0.05  # of Adam, in parts of the root mean square of a matrix
_SURE = 0.9  # probability of every token at which an expert is left as it is


def refined(
    networks: LiveEditNetworks,
    backbone: VisionLanguageModel,
    prefix: Prefix,
    experts: tuple[Tensor, Tensor],
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Return the matrices u and v (B, r, D) after at most `steps` steps for those that need any.

    prefix: the requests with their answers at the edit layer. Rows do not depend on each other.
    """
    weight = _own_weight(networks, backbone, prefix)
    sure = _told(networks, backbone, prefix, experts, weight).exp() > _SURE
    wrong = (~_whole(sure, prefix, backbone)).nonzero()[:, 0].tolist()
    if not wrong or not steps:
        return experts
    part, weight = backbone.select(prefix, wrong), weight[wrong]
    start = [matrix[wrong] for matrix in experts]
    scale = [matrix.square().mean((1, 2), keepdim=True).sqrt() for matrix in start]
    moved = [torch.zeros_like(matrix, requires_grad=True) for matrix in start]
    best = [matrix.clone() for matrix in start]
    missing = torch.ones(len(wrong), 1, 1, dtype=torch.bool, device=weight.device)
    optimizer = torch.optim.Adam(moved, lr=_RATE)
    for step in range(steps + 1):
        with torch.enable_grad():
            now = tuple(m + s * d for m, s, d in zip(start, scale, moved, strict=True))
            told = _told(networks, backbone, part, (now[0], now[1]), weight)
            best = [
                torch.where(missing, new.detach(), old)
                for new, old in zip(now, best, strict=True)
            ]
            missing = (
                missing & ~_whole(told.exp() > _SURE, part, backbone)[:, None, None]
            )
            if step == steps or not bool(missing.any()):
                break
            optimizer.zero_grad()
            (-told.sum()).backward()
        optimizer.step()
    u, v = (matrix.clone() for matrix in experts)
    u[wrong], v[wrong] = best
    return u, v


def _own_weight(
    networks: LiveEditNetworks, backbone: VisionLanguageModel, prefix: Prefix
) -> Tensor:
    """Return how much the expert of each request counts for that request, were it the only one: (B, 1)."""
    batch = prefix.batch
    mean = backbone.mean_image_tokens(batch)
    vision, prompt, against = networks.ask(
        prefix.hidden, batch.prompt_mask, batch.image_mask, mean
    )
    keys = networks.keys(prefix, mean)
    margin = networks.similarity(vision, keys[0]).diagonal()[:, None] - against
    return networks.score(
        networks.similarity(prompt, keys[1]).diagonal()[:, None], margin
    ).sigmoid()


def _told(
    networks: LiveEditNetworks,
    backbone: VisionLanguageModel,
    prefix: Prefix,
    experts: tuple[Tensor, Tensor],
    weight: Tensor,
) -> Tensor:
    """Return the log-probability of every answer token and of the end: (n,), in the order of the rows."""
    at, labels = prefix.batch.target_positions(backbone.end_id)
    normed = networks.stream_norm(prefix.hidden.float())
    u, v = (matrix[:, None] for matrix in experts)
    logits = backbone.resume(
        replace(prefix, hidden=adapt(prefix.hidden, normed, u, v, weight)), at
    ).float()
    return logits.log_softmax(-1).gather(1, labels[at][:, None])[:, 0]


def _whole(right: Tensor, prefix: Prefix, backbone: VisionLanguageModel) -> Tensor:
    """Return for each row whether all its tokens are right: (n,) -> (B,)."""
    at, _ = prefix.batch.target_positions(backbone.end_id)
    whole = torch.ones(len(at), dtype=torch.bool, device=at.device)
    whole[at.nonzero()[~right, 0]] = False
    return whole
