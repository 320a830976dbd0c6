"""Experts of LiveEdit that do not give their answer yet are refined by gradient, each on its own request (ours).

The networks write an expert in one pass. It gives the right answer for nearly every edit, but not for all: an answer
of unusual words may be missed. Only experts that miss are refined, and only the layers above them are run.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mmedit_cli.knowledge.methods.liveedit.experts import adapt
from mmedit_cli.knowledge.methods.liveedit.names import agreement
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
    names: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the matrices u and v (B, r, D) after at most `steps` steps for those that need any.

    prefix: the requests with their answers at the edit layer; `names` of their pictures, where names are compared.
    Rows do not depend on each other.
    """
    weight = _own_weight(networks, backbone, prefix, names)
    said = _log_probabilities(
        networks,
        backbone,
        prefix,
        experts,
        weight,
    )
    known = _all_tokens(
        said.exp() > _SURE,
        prefix,
        backbone,
    )
    wrong = (~known).nonzero()[:, 0].tolist()
    if not wrong or not steps:
        return experts
    part = backbone.select(prefix, wrong)
    weight = weight[wrong]
    u = _Search(experts[0][wrong])
    v = _Search(experts[1][wrong])
    optimizer = torch.optim.Adam([u.moved, v.moved], lr=_RATE)
    missing = torch.ones(
        len(wrong),
        dtype=torch.bool,
        device=weight.device,
    )
    for step in range(steps + 1):
        with torch.enable_grad():
            new_u = u.present
            new_v = v.present
            said = _log_probabilities(
                networks,
                backbone,
                part,
                (new_u, new_v),
                weight,
            )
            # an expert stays as it was when it first gave its whole answer
            u.keep(missing, new_u)
            v.keep(missing, new_v)
            known = _all_tokens(
                said.exp() > _SURE,
                part,
                backbone,
            )
            missing = missing & ~known
            if step == steps or not bool(missing.any()):
                break
            optimizer.zero_grad()
            (-said.sum()).backward()
        optimizer.step()
    refined_u = experts[0].clone()
    refined_v = experts[1].clone()
    refined_u[wrong] = u.best
    refined_v[wrong] = v.best
    return refined_u, refined_v


class _Search:
    """Adam on one matrix for each expert, in parts of its root mean square; `best` is what is kept of each."""

    def __init__(self, start: Tensor) -> None:
        self.moved = torch.zeros_like(start, requires_grad=True)
        self.best = start.clone()
        self._start = start
        self._scale = _root_mean_square(start)

    @property
    def present(self) -> Tensor:
        """The matrices as they are now, with gradients."""
        return self._start + self._scale * self.moved

    def keep(self, rows: Tensor, matrix: Tensor) -> None:
        """Take these matrices as the best of some rows, (B,) bool."""
        self.best = torch.where(
            rows[:, None, None],
            matrix.detach(),
            self.best,
        )


def _root_mean_square(matrix: Tensor) -> Tensor:
    squares = matrix.square()
    return squares.mean((1, 2), keepdim=True).sqrt()


def _own_weight(
    networks: LiveEditNetworks,
    backbone: VisionLanguageModel,
    prefix: Prefix,
    names: Tensor | None,
) -> Tensor:
    """Return the weight that the expert of each request has for that request if there are no others: (B, 1)."""
    batch = prefix.batch
    mean = backbone.mean_image_tokens(batch)
    vision, prompt, sentinel = networks.ask(
        prefix.hidden,
        batch.prompt_mask,
        batch.image_mask,
        mean,
    )
    vision_keys, prompt_keys = networks.keys(prefix, mean)
    by_vision = networks.similarity(vision, vision_keys)
    by_prompt = networks.similarity(prompt, prompt_keys)
    if names is not None:
        agreed = agreement(names, names)
        by_vision = by_vision + networks.named(agreed)
    own_vision = by_vision.diagonal()[:, None]
    own_prompt = by_prompt.diagonal()[:, None]
    margin = own_vision - sentinel
    score = networks.score(own_prompt, margin)
    return score.sigmoid()


def _log_probabilities(
    networks: LiveEditNetworks,
    backbone: VisionLanguageModel,
    prefix: Prefix,
    experts: tuple[Tensor, Tensor],
    weight: Tensor,
) -> Tensor:
    """Return the log-probability of every answer token and of the end: (n,), in the order of the rows."""
    at, labels = prefix.batch.target_positions(backbone.end_id)
    hidden = prefix.hidden
    normed = networks.stream_norm(hidden.float())
    u, v = experts
    adapted = adapt(
        hidden,
        normed,
        u=u[:, None],
        v=v[:, None],
        weight=weight,
    )
    changed = replace(prefix, hidden=adapted)
    logits = backbone.resume(changed, at).float()
    every = logits.log_softmax(-1)
    wanted = labels[at]
    found = every.gather(1, wanted[:, None])
    return found[:, 0]


def _all_tokens(right: Tensor, prefix: Prefix, backbone: VisionLanguageModel) -> Tensor:
    """Return for each row whether all its tokens are right: (n,) -> (B,)."""
    at, _ = prefix.batch.target_positions(backbone.end_id)
    row = at.nonzero()[:, 0]
    wrong = row[~right]
    all_right = torch.ones(
        len(at),
        dtype=torch.bool,
        device=at.device,
    )
    all_right[wrong] = False
    return all_right
