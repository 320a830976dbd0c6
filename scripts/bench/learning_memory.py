"""What gradient checkpointing (`mmedit edit ... --low-memory`) saves and costs while a subject is learned.

    python scripts/bench/learning_memory.py                  # the denoiser of Stable Diffusion 1.5, random weights
    python scripts/bench/learning_memory.py --latent 32      # at 256 pixels

Counted are the bytes of tensors that the forward pass keeps for the way back, without the weights: they depend on
the shapes alone. Times are of one forward and backward pass, both ways in one process.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

WIDTH, TOKENS = 768, 77


def kept(unet: Any, latent: int) -> tuple[int, float]:
    """Return (bytes kept for the way back, seconds) of one training step of a picture."""
    weights = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    sample, hidden = torch.randn(1, 4, latent, latent), torch.randn(1, TOKENS, WIDTH)
    start = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = unet(sample, torch.tensor([500]), hidden).sample.square().mean()
    total = sum(
        storages.values()
    )  # of the forward pass: what is packed on the way back is freed again
    loss.backward()
    return total, time.perf_counter() - start


def main() -> None:
    """Print both."""
    from diffusers import UNet2DConditionModel

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--latent",
        type=int,
        default=64,
        help="side of the latents: an eighth of the pixels",
    )
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(cross_attention_dim=WIDTH).requires_grad_(False)
    for (
        name,
        parameter,
    ) in unet.named_parameters():  # what multi-melo-diffusion hooks: queries and values
        parameter.requires_grad_(name.endswith(("to_q.weight", "to_v.weight")))
    unet.train(False)
    found = []
    for lean in (False, True):
        if lean:
            unet.enable_gradient_checkpointing()
        kept(unet, args.latent)  # warm
        found.append(kept(unet, args.latent))
        unet.zero_grad()
        total, seconds = found[-1]
        print(
            f"{'--low-memory' if lean else 'usual':>12}: {total / 2**20:,.0f} MiB kept, {seconds:.1f} s a step"
        )
    (usual, slow), (lean_bytes, more) = found
    print(
        f"{'ratio':>12}: {lean_bytes / usual:.3f} of the memory, {more / slow:.2f} times as long"
    )


if __name__ == "__main__":
    main()
