"""Finding a model by name, folder or hub id."""

from __future__ import annotations

import json
import struct

import pytest

from mmedit_cli import catalog, registry
from mmedit_cli.errors import ModelError


def model_folder(
    path, model_type="llava", weights=b"x" * 100, name="model.safetensors"
):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    header = b"{}"
    (path / name).write_bytes(struct.pack("<Q", len(header)) + header + weights)
    return path


def test_names_of_the_catalogue_and_folders(tmp_path):
    tiny = catalog.find_model("tiny-blip2")
    assert (tiny.name, tiny.family, tiny.folder) == ("tiny-blip2", "blip2", None)
    folder = model_folder(tmp_path / "mine")
    found = catalog.find_model(str(folder))
    assert (found.name, found.family, found.folder) == ("mine", "llava", folder)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_one_family_may_have_several_model_types(tmp_path, model_type):
    assert (
        catalog.find_model(str(model_folder(tmp_path / "mine", model_type))).family
        == "qwen-vl"
    )


def test_every_model_is_of_a_family_that_is_there():
    assert {entry.family for entry in catalog.MODELS.values()} == set(
        catalog.FAMILIES.values()
    )
    families = {*registry.backbones.names(), *registry.drawing_models.names()}
    assert families == set(catalog.FAMILIES.values())


def test_models_that_come_along_are_found_by_their_folder(tmp_path, monkeypatch, cli):
    monkeypatch.setattr(catalog, "share_dir", lambda name: tmp_path / name)
    model_folder(tmp_path / "data" / "models" / "mini-blip2", "blip-2")
    assert catalog.find_model("mini-blip2").family == "blip2"
    listed = json.loads(cli("list", "--json")[1])["models"]
    assert listed[0]["model"] == "mini-blip2"


def test_the_fingerprint_follows_content_not_place(tmp_path):
    one, same = model_folder(tmp_path / "a"), model_folder(tmp_path / "b")
    other = model_folder(tmp_path / "c", weights=b"y" * 100)
    prints = [
        catalog.find_model(str(folder)).fingerprint for folder in (one, same, other)
    ]
    assert prints[0] == prints[1] != prints[2]
    (one / "config.json").write_text('{"model_type": "llava", "x": 1}')
    assert catalog.find_model(str(one)).fingerprint != prints[0]


def test_missing_shards_and_pickled_weights_are_named(tmp_path):
    folder = model_folder(tmp_path / "a", name="model-00001-of-00002.safetensors")
    index = {
        "weight_map": {
            "x": "model-00001-of-00002.safetensors",
            "y": "model-00002-of-00002.safetensors",
        }
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ModelError,
        match=r"model-00002-of-00002\.safetensors is named in the index but missing",
    ):
        catalog.find_model(str(folder))
    pickled = model_folder(tmp_path / "b", name="pytorch_model.bin")
    with pytest.raises(ModelError) as caught:
        catalog.find_model(str(pickled))
    assert f"mmedit convert safetensors {pickled}" in caught.value.hint


def test_hub_ids_resolve_in_the_cache_first_and_fail_in_one_line(monkeypatch, tmp_path):
    snapshot = model_folder(tmp_path / "snapshot")
    asked = []

    def cached(repo, **options):
        asked.append((repo, options["local_files_only"]))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", cached)
    assert catalog.find_model("llava-hf/llava-1.5-7b-hf").name == "llava-1.5-7b", (
        "a known repository gets its name"
    )
    assert catalog.find_model("somebody/something").name == "somebody/something"
    assert asked == [("llava-hf/llava-1.5-7b-hf", True), ("somebody/something", True)]
    monkeypatch.undo()
    with pytest.raises(
        ModelError,
        match="somebody/something: not in the cache, and HF_HUB_OFFLINE is set",
    ):
        catalog.find_model("somebody/something")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ModelError, match="cannot be fetched from the hub"):
        catalog.find_model("somebody/something")


@pytest.mark.parametrize("name", ["a/b/c", "no such name", "", "../somewhere", "."])
def test_odd_names_are_refused(name):
    with pytest.raises(ModelError):
        catalog.find_model(name)


def test_of_a_pipeline_on_the_hub_only_what_is_needed_is_fetched():
    from fnmatch import fnmatch

    repo = catalog.MODELS["stable-diffusion-v1-5"].repo
    files = {
        "model_index.json": True,
        "unet/config.json": True,
        "unet/diffusion_pytorch_model.safetensors": True,
        "unet/diffusion_pytorch_model.fp16.safetensors": False,
        "v1-5-pruned.safetensors": False,
        "vae/diffusion_pytorch_model.safetensors": True,
        "text_encoder/model.safetensors": True,
        "safety_checker/model.safetensors": False,
        "tokenizer/merges.txt": True,
        "unet/diffusion_pytorch_model.bin": False,
    }
    for file, wanted in files.items():
        assert (
            any(fnmatch(file, pattern) for pattern in catalog.patterns(repo)) == wanted
        ), file
    assert catalog.patterns("llava-hf/llava-1.5-7b-hf") == catalog.FILES


def test_a_pipeline_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipelin", "unet": ["diffusers", "U"]}'
    )
    with pytest.raises(
        ModelError,
        match=r"type 'StableDiffusionPipelin' is not supported \(did you mean StableDiffusionPipeline\?\)",
    ):
        catalog.find_model(str(tmp_path))


def test_the_fingerprint_of_a_pipeline_follows_every_part(tmp_path):
    def folder(name, text=b"x"):
        path = tmp_path / name
        for part in ("unet", "vae", "text_encoder"):
            weights = text * 100 if part == "text_encoder" else b"x" * 100
            model_folder(path / part, weights=weights)
        parts = {part: ["diffusers", "X"] for part in ("unet", "vae", "text_encoder")}
        (path / "model_index.json").write_text(
            json.dumps({"_class_name": "StableDiffusionPipeline", **parts})
        )
        return catalog.find_model(str(path)).fingerprint

    one, same, other = folder("a"), folder("b"), folder("c", b"y")
    assert one == same != other


def test_random_weights_are_never_a_default(monkeypatch, tmp_path):
    assert not any(
        name.startswith("tiny-")
        for name in (*catalog.DEFAULTS, *catalog.DRAWING_DEFAULTS)
    )
    monkeypatch.setattr(catalog, "share_dir", lambda name: tmp_path / name)
    for names in (catalog.DEFAULTS, catalog.DRAWING_DEFAULTS):
        with pytest.raises(ModelError, match=f"no --model, and {names[0]} is not in"):
            catalog.default_model(names)
    assert catalog.loading("tiny-mgie").endswith(
        "random weights, which know nothing; only for trying a command"
    )
    assert catalog.loading("mini-blip2") == "loading mini-blip2"
