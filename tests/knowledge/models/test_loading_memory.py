"""Loading holds the weights once: anonymous memory stays below 1.1 times their size, and mapped files are no copy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import imported_scripts

from mmedit_cli.knowledge.models.shared import tiny
from mmedit_cli.knowledge.models.shared.loading import load_backbone

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/status").is_file(), reason="Linux says what is anonymous"
    ),
]
_MIB = 1 / 1024
_SPARE = 24 * _MIB  # GiB that tokenizer, hooks and the like may take


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model of 128 MiB in bfloat16, in two shards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tiny.tokenizer()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=1024,
        num_hidden_layers=6,
        intermediate_size=2048,
        num_attention_heads=8,
        max_position_embeddings=128,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    folder = tmp_path_factory.mktemp("large") / "llama"
    folder.mkdir()
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    with imported_scripts(weights="bench.random_weights") as scripts:
        scripts.weights.write_weights(model, folder, "model", shard=64 << 20)
    config.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.1), ("float32", 1.1)])
def test_the_weights_are_held_once(folder, tmp_path, dtype, most):
    """In the format of the files they are mapped, in another they are converted tensor by tensor."""
    with imported_scripts(peak="bench.peak_memory") as scripts:

        def load() -> int:
            before = scripts.peak.memory()["RssAnon"]
            with scripts.peak.Peak() as peak:
                backbone = load_backbone(str(folder), device="cpu", dtype=dtype)
            held = sum(
                p.numel() * p.element_size() for p in backbone.model.parameters()
            )
            gib = held / 2**30
            print(f"{peak.anonymous - before:.3f} GiB for {gib:.3f}")
            assert gib > 120 * _MIB
            return int(peak.anonymous - before > most * gib + _SPARE)

        log = tmp_path / "log"
        assert scripts.peak.in_a_copy(load, log, 4).code == 0, log.read_text()


def test_what_takes_too_much_is_killed(tmp_path):
    with imported_scripts(peak="bench.peak_memory") as scripts:

        def fill() -> int:
            held = []
            while len(held) < 64:
                held.append(bytearray(16 << 20))
                torch.ones(1).sum()
            return 0

        had = scripts.peak.memory()["RssAnon"]
        spent = scripts.peak.in_a_copy(fill, tmp_path / "log", had + 64 * _MIB)
    assert (spent.code, spent.anonymous < had + 1) == (-9, True)
