"""A model that is put together of a language model, a tower and parts that come along."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from mmedit_cli import assembled, catalog
from mmedit_cli.catalog import PARTS, find_model
from mmedit_cli.download import assembly, wheels
from mmedit_cli.errors import ModelError
from mmedit_cli.knowledge.loading import load_backbone
from mmedit_cli.knowledge.models.shared import tiny
from mmedit_cli.storage import read_tensors, write_tensors
from mmedit_cli.types import Query

NAME = "mini-smol"
LAYER = "model.language_model.layers.0.self_attn.q_proj"
RANK = 2


def saved(name, folder):
    """Write a tiny model with its tokenizer and processor into a folder."""
    model, tokenizer, processor = tiny.build(name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The folders of a language model and of a LLaVA whose tower is taken."""
    place = tmp_path_factory.mktemp("sources")
    language = saved("tiny-llama-lm", place / "language")
    return language, saved("tiny-llava", place / "tower")


def random_parts(sources, seed):
    """Parts of a model with a random projector and a random change of one layer."""
    model, _, _ = assembled.build(*sources)
    generator = torch.Generator().manual_seed(seed)
    projector = model.get_submodule(assembled.PROJECTOR)
    whole = {
        f"{assembled.PROJECTOR}.{name}": torch.randn(value.shape, generator=generator)
        for name, value in projector.named_parameters()
    }
    weight = model.get_parameter(f"{LAYER}.weight")
    first = torch.randn(RANK, weight.shape[1], generator=generator)
    second = torch.randn(weight.shape[0], RANK, generator=generator)
    return assembled.packed(whole, {LAYER: (first, second)})


@pytest.fixture
def parts(sources, tmp_path, monkeypatch):
    """The file of parts that comes along; the cache is a new one."""
    language, tower = sources
    own = catalog.Assembly(str(language), str(tower), "CC0-1.0")
    entry = catalog.Entry("llava", None, "for a test", assembly=own)
    monkeypatch.setitem(catalog.MODELS, NAME, entry)
    monkeypatch.setenv("MMEDIT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "shipped"
    folder.mkdir()
    for module in (catalog, assembly):
        monkeypatch.setattr(module, "parts_folder", lambda name: folder)
    write_tensors(folder / PARTS, random_parts(sources, 0), {})
    return folder / PARTS


def test_numbers_come_back_within_half_a_level():
    value = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    bias = torch.tensor([0.5, -2.0])
    tensors = assembled.packed({"x.weight": value, "x.bias": bias}, {})
    assert tensors["x.weight"].dtype == torch.int8
    back = assembled.unpacked(tensors)
    assert torch.equal(back["x.bias"], bias)
    largest = value.abs().amax(1, keepdim=True)
    assert ((back["x.weight"] - value).abs() <= largest / 127 * 0.501).all()


def test_parts_are_put_in(sources):
    tensors = random_parts(sources, 0)
    values = assembled.unpacked(tensors)
    model, tokenizer, _ = assembled.build(*sources)
    before = model.get_parameter(f"{LAYER}.weight").clone()
    assembled.put_in(model, tensors, PARTS)
    change = values[f"{LAYER}.lora_B"] @ values[f"{LAYER}.lora_A"]
    after = model.get_parameter(f"{LAYER}.weight")
    assert torch.equal(after, before + change)
    name = f"{assembled.PROJECTOR}.linear_1.weight"
    assert torch.equal(model.get_parameter(name), values[name])
    assert tokenizer.convert_ids_to_tokens(model.config.image_token_id) == "<image>"


def test_the_language_model_says_what_it_said(sources):
    """Without parts of its own, the text side of the whole is the language model bit for bit."""
    language, _ = sources
    alone = load_backbone(str(language))
    model, tokenizer, _ = assembled.build(*sources)
    ids = torch.tensor([tokenizer("What is the capital of France?")["input_ids"]])
    with torch.no_grad():
        expected = alone.model(input_ids=ids).logits
        found = model(input_ids=ids).logits
    assert torch.equal(found[..., : expected.shape[-1]], expected)


def test_no_picture_stands_at_the_first_position(sources, tmp_path):
    """A tokenizer that puts nothing in front of a text, as SmolLM2's, does so afterwards."""
    language, tower = sources
    bare = shutil.copytree(language, tmp_path / "bare")
    tiny.tokenizer(bos=False).save_pretrained(bare)
    _, before, _ = assembled.build(language, tower)
    _, after, _ = assembled.build(bare, tower)
    for tokenizer in (before, after):
        first, *others = tokenizer("<image> x")["input_ids"]
        assert tokenizer.convert_tokens_to_ids("<image>") in others
        assert first in tokenizer.all_special_ids


def test_download_puts_it_together_once(parts, cli):
    code, _, err = cli("download", NAME, "--json")
    assert code == 0, err
    folder = catalog.assembled_folder(NAME)
    backbone = load_backbone(NAME, dtype="float32")
    assert backbone.name == NAME
    expected = assembled.unpacked(read_tensors(parts)[0])
    name = f"{assembled.PROJECTOR}.linear_1.weight"
    found = backbone.model.get_parameter(name)
    assert torch.allclose(found, expected[name], atol=2e-3)
    made = (folder / "model.safetensors").stat().st_mtime_ns
    _, again, _ = cli("download", NAME)
    assert "present" in again
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert cli("download", NAME, "--verify")[0] == 0
    with (folder / "config.json").open("a") as file:
        file.write(" ")
    code, broken, _ = cli("download", NAME, "--verify")
    assert code != 0
    assert "config.json" in broken


def test_other_parts_make_another_model(sources, parts):
    entry = catalog.MODELS[NAME]
    assembly.get(NAME, entry)
    earlier = load_backbone(NAME).fingerprint
    write_tensors(parts, random_parts(sources, 1), {})
    with pytest.raises(ModelError, match="not put together") as raised:
        load_backbone(NAME)
    assert f"mmedit download {NAME}" in raised.value.hint
    assembly.get(NAME, entry)
    assert load_backbone(NAME).fingerprint != earlier


def test_half_a_model_is_never_seen(parts, monkeypatch):
    entry = catalog.MODELS[NAME]

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(assembled, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            assembly.get(NAME, entry)
    assert not catalog.assembled_folder(NAME).exists()
    with pytest.raises(ModelError, match="not put together"):
        load_backbone(NAME)
    assembly.get(NAME, entry)
    assert load_backbone(NAME).generate([Query("What is this?")], max_new_tokens=2)


def test_parts_of_another_model_are_refused(parts):
    wrong = {f"{assembled.PROJECTOR}.linear_1.weight": torch.zeros(3, 3)}
    write_tensors(parts, wrong, {})
    with pytest.raises(ModelError, match="another model"):
        assembly.get(NAME, catalog.MODELS[NAME])
    assert not catalog.assembled_folder(NAME).exists()


def test_parts_that_did_not_come_along_are_missed(parts):
    parts.unlink()
    with pytest.raises(ModelError, match="is not there"):
        load_backbone(NAME)


def test_it_is_listed_with_what_it_is_made_of(parts, cli, sources):
    listed = json.loads(cli("list", "--json")[1])["models"]
    (found,) = (entry for entry in listed if entry["model"] == NAME)
    assert str(sources[0]) in found["source"]


def test_nothing_is_fetched_offline(parts, cli, monkeypatch):
    """A language model that is not here is neither asked of the hub nor taken from its wheel."""
    wheel = catalog.MODELS["smollm2-135m"].wheel
    absent = catalog.Entry("causal-lm", "nobody/nothing", "not here", wheel)
    monkeypatch.setitem(catalog.MODELS, "absent", absent)
    own = replace(catalog.MODELS[NAME].assembly, language="absent")
    entry = replace(catalog.MODELS[NAME], assembly=own)
    monkeypatch.setitem(catalog.MODELS, NAME, entry)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fetched = []
    monkeypatch.setattr(wheels, "get", lambda *_: fetched.append(True))
    code, _, err = cli("download", NAME)
    assert code != 0
    assert "nobody/nothing" in err
    assert not fetched


@pytest.mark.parametrize("option", ["--to", "--revision"])
def test_options_of_other_downloads_are_refused(parts, cli, tmp_path, option):
    code, _, err = cli("download", NAME, option, tmp_path / "x")
    assert code == 2
    assert option in err


def test_a_revision_is_refused_where_there_is_none():
    with pytest.raises(ModelError, match="--revision main: mini-smol is put together"):
        find_model(NAME, revision="main")
