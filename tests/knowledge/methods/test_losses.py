"""Losses against the published code."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file

from mmedit_cli.knowledge.methods.shared.losses import answer_kl, answer_loss


def test_token_losses_and_their_gradients(golden):
    cases = json.loads((golden / "liveedit_token_losses.json").read_text())["cases"]
    tensors = load_file(golden / "liveedit_token_losses.safetensors")
    for i, _ in enumerate(cases):
        new, base, labels, mask = (
            tensors[f"case{i}.{k}"]
            for k in ("logits_new", "logits_base", "labels", "mask")
        )
        new = new.requires_grad_()
        at = mask.bool()
        rows, base_rows = new[:, -at.shape[1] :][at], base[:, -at.shape[1] :][at]
        for loss, name in (
            (answer_loss(rows, labels[at]), "label_loss"),
            (answer_kl(rows, base_rows), "kl_loss"),
        ):
            torch.testing.assert_close(
                loss, tensors[f"case{i}.{name}"].reshape(()), atol=1e-5, rtol=1e-5
            )
            (gradient,) = torch.autograd.grad(loss, new, retain_graph=True)
            torch.testing.assert_close(
                gradient, tensors[f"case{i}.{name}_grad"], atol=1e-5, rtol=1e-5
            )
