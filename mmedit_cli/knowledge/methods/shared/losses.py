"""Losses on answer positions that editors share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def answer_loss(logits: Tensor, answers: Tensor) -> Tensor:
    """Return the mean cross entropy over all answer tokens of a batch (rows with more tokens weigh more).

    logits: (n, V), at the positions that predict; answers: (n,). Computed in float32.
    """
    return F.cross_entropy(logits.float(), answers)


def answer_kl(new: Tensor, base: Tensor) -> Tensor:
    """Return KL(new || base), the mean over n positions: (n, V), (n, V) -> (), in float32.

    This is the direction of LiveEdit's code; its paper writes KL(base || new): swap the arguments for that form.
    """
    return F.kl_div(
        base.float().log_softmax(-1),
        new.float().log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
