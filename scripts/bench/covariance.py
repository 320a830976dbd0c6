"""What the covariance of a text encoder costs beside the encoder itself: time and peak memory, in one run.

    python scripts/bench/covariance.py [--captions 16384] [--layers 12] [--rounds 1]

A CLIP text tower of the size of ViT-L/14's (random weights) reads captions of 5 to 30 tokens. Each side runs in a
process of its own: `encoder` encodes the same unpadded batches and throws them away, `covariance` is
`mmedit_cli.drawing.covariance.estimate`. With fewer layers the encoder is cheaper, so the ratio is a harder test.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mmedit_cli.drawing import covariance
from mmedit_cli.drawing.models import tiny
from mmedit_cli.output import Output
from mmedit_cli.runtime import peak_memory, versions

SIDES = ("encoder", "covariance")


def tower(layers: int) -> Any:
    """Return an object with what `estimate` asks of a model: one random text tower of width 768."""
    from transformers import CLIPTextConfig, CLIPTextModel

    words = tiny.tokenizer()
    torch.manual_seed(0)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=layers,
            num_attention_heads=12,
            max_position_embeddings=77,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    ).eval()
    words.model_max_length = 77

    class Tower:
        former_text = ""
        name, text_fingerprint, width, dtype, tokenizers = (
            "tower",
            "tower",
            768,
            torch.float32,
            (words,),
        )

        @staticmethod
        def encode_ids(ids: Any) -> torch.Tensor:
            return encoder(ids[0]).last_hidden_state

    return Tower()


def write_captions(path: Path, count: int) -> None:
    """Write captions of 3 to 28 words."""
    source, words = random.Random(0), tiny.WORDS
    path.write_text(
        "".join(
            " ".join(source.choices(words, k=source.randint(3, 28))) + "\n"
            for _ in range(count)
        )
    )


def side(name: str, captions: Path, layers: int) -> dict[str, float]:
    """Run one side in this process; return its CPU and wall seconds, and how far the peak memory rose, in MiB."""
    torch.set_num_threads(1)
    model = tower(layers)
    warm = torch.randint(2, 60, (13, 77))
    with torch.inference_mode():
        model.encode_ids([warm])  # 1,001 tokens: the activations of the largest batch
    before, cpu, wall = (
        peak_memory(torch.device("cpu"))["process"],
        time.process_time(),
        time.perf_counter(),
    )
    if name == "covariance":
        covariance.estimate(model, captions, captions.with_suffix(".safetensors"))
    else:
        texts = covariance.read_captions(captions)
        with torch.inference_mode():
            while chunk := list(islice(texts, 2048)):
                for ids in covariance.batches(model, chunk, "valid"):
                    model.encode_ids(ids)
    rose = (peak_memory(torch.device("cpu"))["process"] - before) / (1 << 20)
    return {
        "cpu": time.process_time() - cpu,
        "wall": time.perf_counter() - wall,
        "memory": rose,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--captions", type=int, default=16_384)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        Output().result(
            None,
            lambda: Output().line(
                json.dumps(side(options.side, options.file, options.layers))
            ),
        )
        return
    best: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "captions.txt"
        write_captions(file, options.captions)
        for _ in range(options.rounds):
            for name in SIDES:
                words = [
                    sys.executable,
                    __file__,
                    "--side",
                    name,
                    "--file",
                    file,
                    "--layers",
                    options.layers,
                ]
                done = subprocess.run(
                    list(map(str, words)), check=True, capture_output=True, text=True
                )
                found = json.loads(done.stdout)
                best[name] = {
                    key: min(value, best.get(name, found)[key])
                    for key, value in found.items()
                }
    out = Output()
    out.line(
        f"{options.captions:,} captions, {options.layers} layers of 768, one thread, torch {versions()['torch']}"
    )
    rows = [
        [name, f"{b['cpu']:.1f}", f"{b['wall']:.1f}", f"{b['memory']:.1f}"]
        for name, b in best.items()
    ]
    ours, plain = best["covariance"], best["encoder"]
    ratio = ["ratio, extra", *(f"{ours[k] / plain[k]:.3f}x" for k in ("cpu", "wall"))]
    rows.append([*ratio, f"{ours['memory'] - plain['memory']:+.1f}"])
    out.table(["", "CPU s", "wall s", "peak above the loaded model, MiB"], rows)


if __name__ == "__main__":
    main()
