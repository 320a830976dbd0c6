"""The fingerprint of a model: every byte counts, and what version 0.1.0 kept still opens."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch
from conftest import SHAPES
from safetensors.torch import load_file, save_file

from mmedit_cli import identity
from mmedit_cli.catalog import find_model
from mmedit_cli.errors import ModelError, StateError
from mmedit_cli.knowledge.ledger.edited_model import (
    EditOptions,
    begin_edits,
    open_edits,
)
from mmedit_cli.knowledge.loading import ModelOptions
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.output import Output
from mmedit_cli.types import Query


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a small model."""
    backbone = load_backbone("tiny-blip2", device="cpu")
    folder = tmp_path_factory.mktemp("models") / "mine"
    for part in (backbone.model, backbone.tokenizer, backbone.image_processor):
        part.save_pretrained(folder)
    return folder


def big_file(path, tensors=40, size=1 << 18):
    """Write a weight file that is much longer than the samples a former fingerprint read."""
    source = torch.Generator().manual_seed(0)
    save_file(
        {f"t{i:02}": torch.randn(size, generator=source) for i in range(tensors)}, path
    )


def test_every_tensor_counts(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    path = tmp_path / "model.safetensors"
    big_file(path)
    before = identity.fingerprint(tmp_path)
    former = identity.former_fingerprint(tmp_path)
    tensors = load_file(path)
    changed = {
        name: -tensor if name == "t20" else tensor for name, tensor in tensors.items()
    }
    save_file(changed, path)
    assert identity.former_fingerprint(tmp_path) == former, (
        "the samples of version 0.1.0 do not see it"
    )
    assert identity.fingerprint(tmp_path) != before
    assert len(before) == 32
    assert len(former) == 16


def test_a_former_fingerprint_reads_the_end_of_the_weights(tmp_path):
    """Samples lie every 16 MiB, and one at the end: version 0.1.0 did so, and its ledgers still open."""
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    path = tmp_path / "model.safetensors"
    big_file(path)
    before = identity.former_fingerprint(tmp_path)
    with path.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert identity.former_fingerprint(tmp_path) != before


def test_the_digest_of_a_file_is_computed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MMEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        identity, "_SETTLED", -1.0
    )  # the file is as old as one that was written yesterday
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 1000)
    first = identity.file_digest(path)
    monkeypatch.setattr(identity, "sha256_of", None)  # reading it again would fail
    assert identity.file_digest(path) == first
    monkeypatch.undo()
    monkeypatch.setenv("MMEDIT_CACHE", str(tmp_path / "cache"))
    status = path.stat()
    path.write_bytes(b"b" * 1000)
    os.utime(
        path, ns=(status.st_atime_ns, status.st_mtime_ns)
    )  # same size, same time of the last change
    assert identity.file_digest(path) != first


def test_a_file_written_this_moment_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MMEDIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"a")
    monkeypatch.setattr(identity.time, "time", lambda: path.stat().st_mtime + 1)
    identity.file_digest(path)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(identity.time, "time", lambda: path.stat().st_mtime + 3)
    identity.file_digest(path)
    assert len(list((tmp_path / "cache" / "digests").iterdir())) == 1


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("not a folder")
    monkeypatch.setenv("MMEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "_SETTLED", -1.0)
    (tmp_path / "weights").write_bytes(b"a")
    assert (
        identity.file_digest(tmp_path / "weights")
        == identity.hashlib.sha256(b"a").hexdigest()
    )


@pytest.mark.parametrize(
    "spoil",
    [b"[1]", b"{", b'{"a": 3}', b'{"a": {"data_offsets": [0, 999]}}', b"[" * 5000],
)
def test_a_damaged_header_is_named(tmp_path, spoil):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(spoil).to_bytes(8, "little") + spoil + b"x" * 8)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        identity.read_header(path)


def test_a_ledger_of_version_010_opens_and_says_so(model, tmp_path, capfd):
    options = EditOptions(
        "ft", ModelOptions(str(model), device="cpu"), overrides=("steps=1",)
    )
    ledger = tmp_path / "ledger"
    with begin_edits(ledger, options) as edited:
        edited.edit([Query("What is this?", "a star", SHAPES / "solid/red-circle.png")])
        answers = edited.generate(
            [Query("What is this?", image=SHAPES / "solid/red-circle.png")]
        )
    with open_edits(ledger, out=Output()) as edited:
        assert "0.1.0" not in capfd.readouterr().err
    new, former = identity.fingerprint(model), identity.former_fingerprint(model)
    text = (ledger / "run.yaml").read_text()
    assert text.count(new) == text.count(former) + 2, (
        "the model's, and that of the editor's state"
    )
    (ledger / "run.yaml").write_text(text.replace(new, former))
    with open_edits(ledger, out=Output()) as edited:
        assert (
            edited.generate(
                [Query("What is this?", image=SHAPES / "solid/red-circle.png")]
            )
            == answers
        )
    assert "begun with mmedit 0.1.0" in capfd.readouterr().err
    (ledger / "run.yaml").write_text(text.replace(new, "0" * 16))
    with pytest.raises(StateError, match="is another model"):
        open_edits(ledger)


def test_what_comes_along_was_made_for_models_that_come_along():
    """The shipped networks hold former fingerprints."""
    from mmedit_cli.registry import share_dir
    from mmedit_cli.storage import read_tensors

    for path in sorted((share_dir("data") / "editors").glob("*/*.safetensors")):
        ref = find_model(path.stem)
        assert identity.same_model(
            read_tensors(path)[1]["model"], ref.fingerprint, ref.former
        ), path


def test_fingerprinting_is_quick_the_second_time(tmp_path, monkeypatch):
    monkeypatch.setenv("MMEDIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "llava"}))
    big_file(tmp_path / "m" / "model.safetensors", tensors=2)
    now = time.time()
    monkeypatch.setattr(identity.time, "time", lambda: now + 60)
    first = identity.fingerprint(tmp_path / "m")
    monkeypatch.setattr(identity, "sha256_of", None)
    assert identity.fingerprint(tmp_path / "m") == first
