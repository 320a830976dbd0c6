"""What it saves to compute frozen parts once: CPU time with the caches over CPU time without, in one run.

    python scripts/bench/frozen_parts.py [--cases 12] [--layers 12]

One thread, a random BLIP-2 of moderate size, the small data set of the tests. Three questions:
  edit    an ft edit of 25 steps from the cached prefix, against 25 steps through the whole model
  vision  a connector edit with the vision tower run once, against once a step
  ask     asking the same cases at four milestones with cached prefixes, against computing them each time
Both sides of a row run interleaved, and their answers are compared: the same arg-max, losses within 1e-4.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from mmedit_cli.knowledge.data.base import load_cases
from mmedit_cli.knowledge.evaluation.answers import ask
from mmedit_cli.knowledge.methods.ft import Ft, FtHparams
from mmedit_cli.knowledge.methods.shared.losses import answer_loss
from mmedit_cli.knowledge.models.blip2 import Blip2
from mmedit_cli.knowledge.models.shared import tiny
from mmedit_cli.output import Output
from mmedit_cli.runtime import quiet_libraries, versions

SHAPES = Path(__file__).resolve().parents[2] / "tests" / "data" / "shapes"


def moderate_blip2(layers: int) -> Blip2:
    """Return a random BLIP-2: a tower of 4 x 128 on 64 px / 8, a Q-Former of 2 x 128, OPT of `layers` x 256."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    words = tiny.tokenizer()
    config = Blip2Config(
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 8,
            "initializer_range": 0.02,
        },
        qformer_config={
            "vocab_size": 8,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "encoder_hidden_size": 128,
            "max_position_embeddings": 8,
        },
        text_config=OPTConfig(
            vocab_size=len(words),
            hidden_size=256,
            num_hidden_layers=layers,
            ffn_dim=1024,
            num_attention_heads=8,
            word_embed_proj_dim=256,
            max_position_embeddings=128,
            dropout=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ).to_dict(),
        num_query_tokens=32,
        image_token_index=3,
    )
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config)
    tiny.spread(model)
    return Blip2(
        "moderate",
        model,
        words,
        BlipImageProcessorPil(size={"height": 64, "width": 64}),
        "moderate",
    )


class Uncached(Ft):
    """ft as the published loops run it: every step goes through the whole model."""

    def _prepare(self, requests: Any) -> Callable[[], torch.Tensor]:
        batch = self.backbone.batch(requests)
        return lambda: answer_loss(
            self.backbone.logits(batch)[batch.predicting], batch.answers
        )


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return (CPU seconds, result)."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def edits(backbone: Blip2, cls: type[Ft], cases: Any, target: str) -> list[list[float]]:
    """Make one edit a case, each undone; return the losses."""
    losses = []
    for case in cases:
        with cls(backbone, FtHparams(target=target, stop_loss=0.0)).edit(
            [case.request]
        ) as edited:
            losses.append(edited.info["losses"])
    return losses


def asked(backbone: Blip2, cases: Any, *, cached: bool) -> list[list[tuple[int, ...]]]:
    """Ask everything about the cases four times, teacher-forced, as at four milestones."""
    queries = [q for case in cases for _, qs in case.columns() for q in qs]
    layer = backbone.n_layers - 1
    activations = (
        backbone.cached_activations(layer, queries, group=16, budget=1 << 30)
        if cached
        else nullcontext()
    )
    with activations:
        rounds = [
            ask(backbone, queries, layer=layer, top={}, max_new_tokens=0, batch_size=16)
            for _ in range(4)
        ]
    return [[answers[q].said for q in queries] for answers in rounds]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    backbone, cases = (
        moderate_blip2(options.layers),
        load_cases(SHAPES, limit=options.cases),
    )
    edits(backbone, Ft, cases[:1], "lm")
    pairs = {
        "edit": [
            lambda cls=cls: edits(backbone, cls, cases, "lm") for cls in (Ft, Uncached)
        ],
        "vision": [
            lambda cls=cls: edits(backbone, cls, cases, "connector")
            for cls in (Ft, Uncached)
        ],
        "ask": [
            lambda cached=cached: asked(backbone, cases, cached=cached)
            for cached in (True, False)
        ],
    }
    rows = []
    for name, (with_caches, without) in pairs.items():
        (ours, one), (plain, other) = seconds(with_caches), seconds(without)
        if name == "ask":
            assert one == other, "the arg-max differ"
        else:
            torch.testing.assert_close(
                torch.tensor(one), torch.tensor(other), atol=1e-4, rtol=1e-4
            )
        rows.append([name, f"{ours:.2f}", f"{plain:.2f}", f"{plain / ours:.1f}x"])
    out = Output()
    out.line(
        f"{options.cases} cases, {options.layers} layers, one thread, torch {versions()['torch']}"
    )
    out.table(["", "cached, CPU s", "uncached, CPU s", "uncached / cached"], rows)


if __name__ == "__main__":
    main()
