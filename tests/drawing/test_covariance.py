"""The second moment of text encodings: exact, streamed, continued, imported, and never inverted blindly."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from mmedit_cli.drawing import covariance as moments
from mmedit_cli.drawing.covariance import (
    Covariance,
    SecondMoment,
    check,
    estimate,
    import_matrix,
)
from mmedit_cli.drawing.models.loading import load_stable_diffusion
from mmedit_cli.errors import DataError, StateError

SHIPPED = ROOT.parent / "shared" / "data" / "perfusion" / "covariance_CLIP_ViT-L-14.pt"
TEXTS = [
    "a dog",
    "a photo of a cat on the beach",
    "toy",
    "a red boot",
    "a photo of a stuffed animal",
    "a dog",
]


@pytest.fixture(scope="module", params=["tiny-sd", "tiny-sdxl"])
def model(request):
    return load_stable_diffusion(request.param, device="cpu")


@pytest.fixture
def captions(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("\n\n".join(TEXTS) + "\n")
    return path


def by_hand(model, texts, count=None):
    """Every caption alone, padded as the pipeline does; `count` None keeps the tokens up to the first end."""
    rows = []
    for text in texts:
        tokens = model.tokenize([text])
        hidden = model.encode(tokens).hidden[0]
        rows.append(hidden[: count or int(tokens.lengths)].double())
    rows = torch.cat(rows)
    return rows.T @ rows / len(rows), len(rows)


def test_it_is_the_mean_outer_product_of_valid_tokens(model, captions, tmp_path):
    found = estimate(model, captions, tmp_path / "c.safetensors")
    wanted, count = by_hand(model, TEXTS)
    torch.testing.assert_close(found.matrix, wanted, atol=1e-6, rtol=1e-5)
    assert (found.texts, found.tokens) == (len(TEXTS), count)
    assert torch.equal(found.matrix, found.matrix.T)
    assert found.source["captions"] == moments.survey(captions)[0]
    padded = estimate(model, captions, tmp_path / "all.safetensors", rule="all")
    wanted, count = by_hand(model, TEXTS, 24)
    torch.testing.assert_close(padded.matrix, wanted, atol=1e-6, rtol=1e-5)
    assert padded.tokens == count == 24 * len(TEXTS)
    assert (padded.matrix - found.matrix).abs().max() > 0.01


def test_long_captions_are_cut_as_the_model_cuts_them(model, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("dog " * 100)
    found = estimate(model, path, tmp_path / "c.safetensors")
    wanted, count = by_hand(model, ["dog " * 100])
    torch.testing.assert_close(found.matrix, wanted, atol=1e-6, rtol=1e-5)
    assert found.tokens == count == 24


def test_order_and_parts_do_not_matter(model, tmp_path):
    def of(texts):
        path = tmp_path / "some.txt"
        path.write_text("\n".join(texts))
        return estimate(model, path, tmp_path / "some.safetensors")

    one = of(TEXTS)
    torch.testing.assert_close(of(TEXTS[::-1]).matrix, one.matrix, atol=0, rtol=1e-6)
    halves = [of(TEXTS[:2]), of(TEXTS[2:])]
    merged = SecondMoment.empty(model.width)
    for half in halves:
        merged = merged.merge(
            SecondMoment(half.matrix * half.tokens, half.texts, half.tokens)
        )
    torch.testing.assert_close(
        Covariance.of(merged, {}).matrix, one.matrix, atol=1e-6, rtol=1e-5
    )
    assert (merged.texts, merged.tokens) == (one.texts, one.tokens)


def test_an_interrupted_run_ends_the_same(model, captions, tmp_path, monkeypatch):
    monkeypatch.setattr(moments, "_CHUNK", 2)
    monkeypatch.setattr(moments, "_SAVE_SECONDS", -1.0)
    whole = estimate(model, captions, tmp_path / "whole.safetensors")
    real, calls = model.encode_ids, []

    def failing(ids):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(ids)

    monkeypatch.setattr(model, "encode_ids", failing)
    with pytest.raises(KeyboardInterrupt):
        estimate(model, captions, tmp_path / "c.safetensors")
    assert not (tmp_path / "c.safetensors").exists()
    done = []
    found = estimate(model, captions, tmp_path / "c.safetensors", tick=done.append)
    assert torch.equal(found.matrix, whole.matrix)
    assert done[0] > 0, "it continued"
    assert sum(done) == len(TEXTS)
    assert not list(tmp_path.glob("*.partial"))


def test_another_run_does_not_continue_it(model, captions, tmp_path, monkeypatch):
    partial = tmp_path / "c.safetensors.partial"
    moments._pause(
        partial,
        SecondMoment(torch.ones(model.width, model.width).double(), 2, 9),
        {"captions": "others"},
    )
    found = estimate(model, captions, tmp_path / "c.safetensors")
    torch.testing.assert_close(
        found.matrix, by_hand(model, TEXTS)[0], atol=1e-6, rtol=1e-5
    )


def test_published_numbers(golden):
    tensors = load_file(golden / "perfusion_covariance.safetensors")
    moment = SecondMoment.empty(12)
    for encodings, mask in zip(tensors["encodings"], tensors["mask"], strict=True):
        moment.add(encodings[mask][None])
    # the reference divides by texts
    ours = Covariance.of(moment, {}).matrix * moment.tokens / moment.texts
    torch.testing.assert_close(
        ours.float(), tensors["covariance"], atol=1e-4, rtol=1e-5
    )


@pytest.mark.skipif(
    not SHIPPED.is_file(), reason="the published matrix is not part of the repository"
)
def test_the_published_matrix():
    class Sized:
        width, name, text_fingerprint, former_text = 768, "sized", "x", ""

    found = import_matrix(SHIPPED, Sized())
    summary = found.summary()
    assert found.matrix.shape == (768, 768)
    assert torch.equal(found.matrix, found.matrix.T)
    assert summary["smallest_eigenvalue"] == pytest.approx(1.1301, abs=1e-3)
    assert summary["largest_eigenvalue"] == pytest.approx(4433.9, abs=0.1)
    assert summary["condition"] == pytest.approx(3923, abs=2)
    assert summary["trace"] == pytest.approx(15328.0, abs=0.1)
    assert summary["effective_rank"] == pytest.approx(112.6, abs=0.1)
    factor, ridge = found.factor()
    assert ridge == 0
    torch.testing.assert_close(factor @ factor.T, found.matrix, atol=1e-9, rtol=1e-9)
    Sized.width = 512
    with pytest.raises(
        DataError, match="768 x 768, but the text encodings of sized have 512"
    ):
        import_matrix(SHIPPED, Sized())


def test_a_ridge_only_where_it_is_needed():
    rows = torch.randn(
        400, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    full = rows.T @ rows / 400
    assert Covariance(full, tokens=400).factor()[1] == 0
    assert Covariance(full, tokens=159).factor()[1] == 1e-3, (
        "fewer than 20 tokens a dimension"
    )
    flat = rows[:4].T @ rows[:4]
    assert 0 < Covariance(flat).factor()[1] <= 1e-3
    with pytest.raises(DataError, match="not positive definite with ridge 0"):
        Covariance(flat).factor(0.0)
    with pytest.raises(DataError, match="not positive definite"):
        Covariance(-full).factor()


def test_what_is_imported_is_looked_at(model, tmp_path):
    good = torch.eye(model.width)
    path = tmp_path / "c.pt"
    torch.save(good, path)
    assert torch.equal(import_matrix(path, model).matrix, good.double())
    save_file({"C": good}, tmp_path / "c.safetensors")
    assert torch.equal(
        import_matrix(tmp_path / "c.safetensors", model).matrix, good.double()
    )
    for bad, reason in [
        ({"a": good}, "holds no single matrix"),
        (good[0], "not a square matrix"),
        (good * torch.nan, "not finite"),
        (good + torch.rand(model.width, model.width), "not symmetric"),
        (pytest.raises, "not a plain tensor"),  # needs a real unpickler
    ]:
        torch.save(bad, path)
        with pytest.raises(DataError, match=reason):
            import_matrix(path, model)
    with pytest.raises(DataError, match="no such file"):
        import_matrix(tmp_path / "none.pt", model)


def test_it_belongs_to_a_text_encoder(model, captions, tmp_path):
    path = tmp_path / "c.safetensors"
    found = estimate(model, captions, path)
    again = Covariance.load(path)
    assert torch.equal(again.matrix, found.matrix)
    assert (again.texts, again.tokens, again.source, again.digest) == (
        found.texts,
        found.tokens,
        found.source,
        found.digest,
    )
    check(again, model)
    other = load_stable_diffusion(
        "tiny-sdxl" if model.name == "tiny-sd" else "tiny-sd", device="cpu"
    )
    with pytest.raises(StateError, match=f"made for the text encoder of {model.name}"):
        check(again, other)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(StateError, match="not a covariance"):
        Covariance.load(path)


def test_captions_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        moments.survey(tmp_path / "none.txt")
    (tmp_path / "bad.txt").write_bytes(b"a dog\n\xff\xfe\n")
    with pytest.raises(
        DataError, match=r"bad\.txt:2: not UTF-8 \(byte 0 of the line\)"
    ):
        moments.survey(tmp_path / "bad.txt")


def test_there_are_captions_without_a_file():
    texts = list(moments.read_captions(None))
    assert len(texts) > 5000
    assert len(set(texts)) == len(texts)


def test_the_command(cli, captions, tmp_path, monkeypatch):
    monkeypatch.setenv("MMEDIT_CACHE", str(tmp_path / "cache"))
    words = ("covariance", "--model", "tiny-sd", "--captions", captions)
    code, text, talk = cli(*words, "--json")
    report = json.loads(text)
    assert (code, report["texts"], report["width"]) == (0, len(TEXTS), 32)
    assert "a ridge of 0.001" in talk
    assert report["path"].startswith(str(tmp_path / "cache"))
    code, _, talk = cli(*words)
    assert (code, "there already" in talk) == (2, True)
    code, text, _ = cli(*words, "--force")
    assert (code, "effective rank" in text) == (0, True)
    torch.save(torch.eye(32), tmp_path / "m.pt")
    code, text, _ = cli(
        "covariance",
        "--model",
        "tiny-sd",
        "--import",
        tmp_path / "m.pt",
        "-o",
        tmp_path / "o",
        "--json",
    )
    assert (code, json.loads(text)["imported"]) == (0, "m.pt")
    assert cli(*words, "--import", tmp_path / "m.pt")[0] == 2
    (tmp_path / "empty.txt").touch()
    code, _, talk = cli(
        "covariance",
        "--model",
        "tiny-sd",
        "--captions",
        tmp_path / "empty.txt",
        "--force",
    )
    assert (code, "no captions" in talk) == (2, True)
