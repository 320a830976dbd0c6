"""Opening models that others made: what is missing, foreign or damaged is refused in one line with the way out."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest
import torch
from conftest import SHAPES
from safetensors.torch import load_file, save_file

from mmedit_cli.catalog import find_model
from mmedit_cli.drawing.models.loading import load_stable_diffusion
from mmedit_cli.drawing.models.stable_diffusion import Sampling
from mmedit_cli.errors import DataError, ModelError
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.pickled_weights import to_safetensors
from mmedit_cli.picture_editing.methods.shared.loading import (
    load_pipeline,
    load_text_encoder,
)
from mmedit_cli.runtime import LoadOptions
from mmedit_cli.types import Query

EVIL = """
from pathlib import Path
Path(__file__).parent.joinpath("ran").touch()
Path("{trace}").touch()
class Evil: pass
"""


def save(backbone, folder):
    for part in (backbone.model, backbone.tokenizer, backbone.image_processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Folders of small models as save_pretrained writes them."""
    root = tmp_path_factory.mktemp("originals")
    save(load_backbone("tiny-llava", device="cpu"), root / "llava")
    save(load_backbone("tiny-blip2", device="cpu"), root / "blip2")
    load_stable_diffusion("tiny-sd", device="cpu").pipe.save_pretrained(root / "sd")
    load_pipeline(
        "tiny-ip2p", "StableDiffusionInstructPix2PixPipeline", LoadOptions(device="cpu")
    ).pipeline.save_pretrained(root / "ip2p")
    return root


@pytest.fixture
def copy(originals, tmp_path):
    """Return a copy of one of them: `copy("llava")`."""

    def make(name):
        return shutil.copytree(originals / name, tmp_path / "models" / name)

    return make


def change(path, **values):
    """Change keys of a JSON file; None stays as null."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | values))


def opened(folder):
    """Return the model of a folder, or None if it is refused as it has to be: in one line that names the folder."""
    try:
        return load_backbone(str(folder), device="cpu")
    except (ModelError, DataError) as error:
        refused = error
    assert len(refused.problems) == 1
    assert "\n" not in str(refused)
    assert str(folder) in str(refused)
    return None


# -- no code of others ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "auto_map"),
    [
        (
            "config.json",
            {"AutoConfig": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil"},
        ),
        (
            "preprocessor_config.json",
            {"AutoImageProcessor": "evil.Evil", "AutoProcessor": "evil.Evil"},
        ),
        (
            "processor_config.json",
            {"AutoProcessor": "evil.Evil", "AutoImageProcessor": "evil.Evil"},
        ),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
    ],
)
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_code_in_a_model_folder_is_never_run(
    copy, tmp_path, monkeypatch, capsys, file, auto_map, known
):
    folder = copy("llava")
    (folder / "evil.py").write_text(EVIL.format(trace=tmp_path / "ran"))
    names = {
        "preprocessor_config.json": "image_processor_type",
        "tokenizer_config.json": "tokenizer_class",
    }
    foreign = {names[file]: "Evil"} if file in names and not known else {}
    change(folder / file, auto_map=auto_map, **foreign)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\ny\n"))
    opened(folder)
    assert sys.stdin.read() == "y\ny\ny\n", "it asked"
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "entry",
    [["transformers", "AutoTokenizer"], ["evil", "Evil"], ["pipeline_evil", "Evil"]],
)
def test_code_in_a_pipeline_is_never_run(copy, tmp_path, monkeypatch, entry):
    folder = copy("sd")
    for name in ("evil.py", "pipeline_evil.py", "tokenizer/evil.py"):
        (folder / name).write_text(EVIL.format(trace=tmp_path / "ran"))
    change(folder / "model_index.json", tokenizer=entry)
    change(
        folder / "tokenizer" / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Evil", None]},
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\n"))
    with pytest.raises(ModelError):
        load_stable_diffusion(str(folder), device="cpu")
    assert sys.stdin.read() == "y\ny\n"
    assert not (tmp_path / "ran").exists()


# -- vocabularies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["blip2", "llava"])
def test_a_model_without_its_vocabulary_is_refused(copy, name):
    folder = copy(name)
    (folder / "tokenizer.json").unlink()
    change(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    with pytest.raises(
        ModelError,
        match=r"tokenizer (has \d+ of the \d+ tokens|cannot spell)|no usable",
    ):
        load_backbone(str(folder), device="cpu")


def test_the_tokenizer_of_another_model_is_refused(copy):
    from transformers import AutoTokenizer

    folder = copy("llava")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"word{i}" for i in range(50)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        ModelError, match=r"the tokenizer has \d+ tokens, the model embeds \d+"
    ):
        load_backbone(str(folder), device="cpu")


def test_a_pipeline_without_its_tokenizer_files_is_refused(copy):
    folder = copy("sd")
    for file in (folder / "tokenizer").iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()
    with pytest.raises(
        ModelError, match=r"sd/tokenizer: the tokenizer has \d+ of the \d+ tokens"
    ):
        load_stable_diffusion(str(folder), device="cpu")
    editor = copy("ip2p")
    for file in (editor / "tokenizer").iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()
    with pytest.raises(
        ModelError, match=r"ip2p/tokenizer: the tokenizer has \d+ of the \d+ tokens"
    ):
        load_pipeline(
            str(editor),
            "StableDiffusionInstructPix2PixPipeline",
            LoadOptions(device="cpu"),
        )
    with pytest.raises(
        ModelError, match=r"ip2p/tokenizer: the tokenizer has \d+ of the \d+ tokens"
    ):
        load_text_encoder(str(editor))


# -- configs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("preprocessor_config.json", {"image_mean": None, "do_normalize": True}),
        ("preprocessor_config.json", {"size": None}),
        ("preprocessor_config.json", {"size": {"height": None}}),
        ("preprocessor_config.json", {"image_processor_type": None}),
        ("tokenizer_config.json", {"tokenizer_class": None}),
        ("tokenizer_config.json", {"extra_special_tokens": None}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"3": None}}),
        ("tokenizer_config.json", {"model_max_length": None}),
        ("tokenizer_config.json", {"eos_token": None}),
        ("tokenizer.json", {"model": None}),
        ("config.json", {"text_config": None}),
        ("config.json", {"vision_config": None}),
        ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
        ("config.json", {"quantization_config": {"quant_method": "nobody"}}),
        ("config.json", {"dtype": "float99"}),
    ],
)
def test_null_in_a_config_is_one_line_or_harmless(copy, file, values):
    folder = copy("llava")
    change(folder / file, **values)
    backbone = opened(folder)
    if backbone is not None:
        backbone.generate(
            [Query("What is this?", image=SHAPES / "solid/red-circle.png")],
            max_new_tokens=1,
        )


def test_a_quantized_folder_names_the_package_it_needs(copy):
    folder = copy("llava")
    change(
        folder / "config.json",
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
    )
    with pytest.raises(ModelError, match=r"(?i)bitsandbytes") as caught:
        load_backbone(str(folder), device="cpu")
    assert "bitsandbytes" in caught.value.hint


def test_an_index_without_a_weight_map_is_named(copy):
    folder = copy("llava")
    index = folder / "model.safetensors.index.json"
    for content in (
        "{}",
        "[]",
        '{"weight_map": {}}',
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
    ):
        index.write_text(content)
        with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
            find_model(str(folder))
    index.write_text('{"weight_map": {"a": "../../elsewhere.safetensors"}}')
    with pytest.raises(ModelError, match="is not the name of a file beside it"):
        find_model(str(folder))


def test_a_chat_template_that_is_kept_for_the_processor_is_found(copy):
    folder = copy("llava")
    template = (
        "{% for m in messages %}{% for c in m.content %}{{ c.text if c.type == 'text' else '<image>' }}"
        "{% endfor %}{% endfor %} A:"
    )
    assert not load_backbone(str(folder), device="cpu").tokenizer.chat_template
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    backbone = load_backbone(str(folder), device="cpu")
    assert backbone.chat("What is this?", with_image=True) == "<image>What is this? A:"
    backbone.encode(
        Query("What is this?", "star", SHAPES / "solid/red-circle.png", chat=True)
    )
    (folder / "chat_template.json").write_text("[]")
    with pytest.raises(ModelError, match=r"chat_template\.json"):
        load_backbone(str(folder), device="cpu")


# -- pipelines ------------------------------------------------------------------------------------------------------


def with_scheduler(folder, kind, **values):
    path = folder / "scheduler" / "scheduler_config.json"
    usual = {
        k: v for k, v in json.loads(path.read_text()).items() if k.startswith("beta")
    }
    content = {**usual, "steps_offset": 1}
    if kind in ("DDIMScheduler", "LCMScheduler"):
        content["clip_sample"] = False
    path.write_text(json.dumps({**content, "_class_name": kind, **values}))
    change(folder / "model_index.json", scheduler=["diffusers", kind])
    return folder


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}),
        (
            "DPMSolverMultistepScheduler",
            {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
        ),
        ("DDIMScheduler", {"prediction_type": "sample"}),
        ("EDMEulerScheduler", {}),
    ],
)
def test_a_scheduler_of_another_kind_of_model_is_refused(copy, kind, values):
    with pytest.raises(
        ModelError, match=rf"{kind} .*is not one for Stable Diffusion"
    ) as caught:
        load_stable_diffusion(
            str(with_scheduler(copy("sd"), kind, **values)), device="cpu"
        )
    assert "scheduler_config.json" in caught.value.hint


def test_a_scheduler_that_needs_another_package_names_it(copy, monkeypatch):
    import diffusers

    class Needy(diffusers.DDIMScheduler):
        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            raise ImportError(
                "\nLMSDiscreteScheduler requires scipy, install it: `pip install scipy`\n"
            )

    monkeypatch.setattr(diffusers, "LMSDiscreteScheduler", Needy)
    with pytest.raises(
        ModelError, match="LMSDiscreteScheduler requires scipy"
    ) as caught:
        load_stable_diffusion(
            str(with_scheduler(copy("sd"), "LMSDiscreteScheduler")), device="cpu"
        )
    assert caught.value.hint == "pip install scipy"


@pytest.mark.parametrize(
    ("kind", "values", "steps"),
    [
        ("PNDMScheduler", {"skip_prk_steps": False}, 3),
        ("PNDMScheduler", {"skip_prk_steps": True}, 1001),
        ("DDIMScheduler", {}, 1001),
        ("DDIMScheduler", {}, 0),
        ("EulerDiscreteScheduler", {}, 1001),
    ],
)
def test_steps_a_scheduler_cannot_make_are_refused(copy, kind, values, steps):
    model = load_stable_diffusion(
        str(with_scheduler(copy("sd"), kind, **values)), device="cpu"
    )
    with pytest.raises(DataError, match=rf"--steps {steps}: {kind}"):
        model.generate(["a dog"], [0], Sampling(steps=steps))


@pytest.mark.parametrize(
    "kind",
    [
        "PNDMScheduler",
        "EulerAncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "LCMScheduler",
    ],
)
def test_usual_schedulers_draw(copy, kind):
    model = load_stable_diffusion(str(with_scheduler(copy("sd"), kind)), device="cpu")
    state = torch.get_rng_state()
    assert len(model.generate(["a dog"], [0], Sampling(steps=4))) == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_a_unet_that_does_not_say_its_size_draws_a_size_that_is_given(copy):
    folder = copy("sd")
    change(folder / "unet" / "config.json", sample_size=None)
    model = load_stable_diffusion(str(folder), device="cpu")
    with pytest.raises(ModelError, match="has no sample_size") as caught:
        model.generate(["a dog"], [0], Sampling(steps=2))
    assert "--size" in caught.value.hint
    (picture,) = model.generate(["a dog"], [0], Sampling(steps=2, resolution=16))
    assert picture.size == (16, 16)


@pytest.mark.parametrize("value", [None, 10**30])
def test_a_tokenizer_without_a_limit_gets_that_of_its_encoder(copy, value):
    folder, editor = copy("sd"), copy("ip2p")
    for path in (folder, editor):
        change(path / "tokenizer" / "tokenizer_config.json", model_max_length=value)
    model = load_stable_diffusion(str(folder), device="cpu")
    assert model.max_length == 24
    found = load_pipeline(
        str(editor), "StableDiffusionInstructPix2PixPipeline", LoadOptions(device="cpu")
    )
    assert found.pipeline.tokenizer.model_max_length == 77
    assert load_text_encoder(str(editor))[0].model_max_length == 77


# -- not a model ----------------------------------------------------------------------------------------------------


def test_a_peft_adapter_says_what_it_is(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "llava-hf/llava-1.5-7b-hf"})
    )
    save_file(
        {"base_model.model.x.lora_A.weight": torch.ones(1, 2)},
        folder / "adapter_model.safetensors",
    )
    with pytest.raises(
        ModelError, match=r"a PEFT adapter on llava-hf/llava-1\.5-7b-hf, not a model"
    ) as caught:
        find_model(str(folder))
    assert "merge_and_unload" in caught.value.hint
    with pytest.raises(ModelError, match=r"1 PEFT adapters, not a model"):
        find_model(str(tmp_path))


def test_an_adapter_beside_a_model_is_not_put_on_it_silently(copy):
    """transformers would load the base model that the adapter names, from the hub if need be."""
    folder = copy("llava")
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "somebody/else"})
    )
    with pytest.raises(ModelError, match="a PEFT adapter on somebody/else"):
        load_backbone(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("names", "maker"),
    [
        (
            [
                "lora_unet_down.lora_down.weight",
                "lora_unet_down.lora_up.weight",
                "lora_unet_down.alpha",
            ],
            "kohya",
        ),
        (["lora_te1_text.lora_down.weight", "lora_te1_text.lora_up.weight"], "kohya"),
        (
            ["unet.down.to_k.lora.down.weight", "unet.down.to_k.lora.up.weight"],
            "diffusers",
        ),
        (["unet.down.to_q.lora_A.weight", "unet.down.to_q.lora_B.weight"], "diffusers"),
    ],
)
def test_a_lora_for_pictures_says_what_it_is(tmp_path, names, maker):
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({name: torch.ones(1, 2) for name in names}, path)
    for given in (path, tmp_path):
        with pytest.raises(
            ModelError, match=f"a LoRA adapter in the format of {maker}, not a model"
        ) as caught:
            find_model(str(given))
        assert "load_lora_weights" in caught.value.hint
        with pytest.raises(
            ModelError, match=f"a LoRA adapter in the format of {maker}, not a model"
        ):
            load_pipeline(
                str(given),
                "StableDiffusionInstructPix2PixPipeline",
                LoadOptions(device="cpu"),
            )


def test_a_single_file_ledgers_concepts_and_exports_say_what_they_are(tmp_path):
    checkpoint = tmp_path / "v1-5.safetensors"
    save_file({"model.diffusion_model.weight": torch.ones(1)}, checkpoint)
    with pytest.raises(ModelError, match="a single file") as caught:
        find_model(str(checkpoint))
    assert "mmedit convert checkpoint" in caught.value.hint
    (tmp_path / "weights.gguf").write_text("x")
    with pytest.raises(
        ModelError, match="a file, where the folder of a model is needed"
    ):
        find_model(str(tmp_path / "weights.gguf"))
    contents = {
        "a ledger of edits": {"run.yaml": "", "edits.jsonl": ""},
        "a folder of concepts": {"index.json": '{"concepts": []}'},
        "an export of mmedit": {"config.json": '{"model_type": "mmedit-liveedit"}'},
    }
    for i, (what, files) in enumerate(contents.items()):
        folder = tmp_path / f"folder{i}"
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        with pytest.raises(ModelError, match=what) as caught:
            find_model(str(folder))
        assert "mmedit " in caught.value.hint


def test_our_own_exports_are_recognised(tmp_path):
    from mmedit_cli.drawing.methods.shared import lora_files

    lora_files.export(
        tmp_path / "toy.safetensors",
        {f"unet.a.to_k{end}": torch.ones(1, 2) for end in (lora_files.A, lora_files.B)},
    )
    with pytest.raises(ModelError, match="a LoRA adapter in the format of diffusers"):
        find_model(str(tmp_path / "toy.safetensors"))


def test_a_folder_with_a_known_name_has_to_be_meant(copy, tmp_path, monkeypatch):
    folder = copy("llava")
    monkeypatch.chdir(tmp_path)
    for name in (
        "tiny-blip2",
        "llava-1.5-7b",
        "mini-blip2",
        "instruct-pix2pix",
        "mini-ip2p",
    ):
        shutil.copytree(folder, name)
    for name in ("tiny-blip2", "llava-1.5-7b", "mini-blip2"):
        with pytest.raises(
            ModelError, match="the name of a model that is known, and of a folder here"
        ) as caught:
            find_model(name)
        assert f"--model ./{name} is the folder" in caught.value.hint
        assert find_model(f"./{name}").family == "llava"
    for name in ("instruct-pix2pix", "mini-ip2p"):
        with pytest.raises(
            ModelError, match="the name of a model that is known, and of a folder here"
        ):
            load_pipeline(
                name,
                "StableDiffusionInstructPix2PixPipeline",
                LoadOptions(device="cpu"),
            )
    (tmp_path / "tiny-llava").mkdir()  # a folder of something else
    assert find_model("tiny-llava").folder is None


def test_a_folder_that_is_not_there_is_said_before_a_hub_is_asked(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "blip2").mkdir(parents=True)
    monkeypatch.setattr("mmedit_cli.catalog.hub_folder", None)
    with pytest.raises(
        ModelError,
        match=r"--model models/blip: no such folder \(did you mean blip2\?\)",
    ) as caught:
        find_model("models/blip")
    assert "models has: blip2" in caught.value.hint
    monkeypatch.setattr(
        "mmedit_cli.picture_editing.methods.shared.loading.hub_folder", None
    )
    with pytest.raises(ModelError, match="no such folder"):
        load_pipeline(
            "models/nosuch",
            "StableDiffusionInstructPix2PixPipeline",
            LoadOptions(device="cpu"),
        )


# -- pickled weights ------------------------------------------------------------------------------------------------


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickled_weights_are_converted(copy, tmp_path, cli):
    folder = copy("llava")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="its weights are pickled") as caught:
        load_backbone(str(folder), device="cpu")
    words = caught.value.hint.removeprefix("convert them: mmedit ").split()
    code, out, err = cli(*words)
    assert (code, out.strip()) == (0, words[-1]), err
    loaded, original = (
        load_backbone(words[-1], device="cpu"),
        load_backbone("tiny-llava", device="cpu"),
    )
    query = [Query("What is this?", image=SHAPES / "solid/red-circle.png")]
    assert loaded.generate(query) == original.generate(query)
    torch.save(Trap(tmp_path / "ran"), folder / "pytorch_model.bin")
    code, _, err = cli("convert", "safetensors", folder, tmp_path / "again")
    assert code == 2
    assert "pytorch_model.bin: not a file of tensors" in err
    assert not (tmp_path / "again").exists()
    assert not (tmp_path / "ran").exists()


def test_shards_tied_weights_and_parts_of_pipelines_are_converted(copy, tmp_path):
    folder = copy("llava")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-0000{i}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    assert len(to_safetensors(folder, tmp_path / "out", lambda text: None)) == 2
    assert load_backbone(str(tmp_path / "out"), device="cpu").n_layers == 6
    pipeline = copy("sd")
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        path = pipeline / part / f"{name}.safetensors"
        tied = load_file(path)
        tied["again"] = tied[min(tied)]
        torch.save(
            tied,
            path.with_name(
                "diffusion_pytorch_model.bin" if part == "unet" else "pytorch_model.bin"
            ),
        )
        path.unlink()
    with pytest.raises(ModelError, match="its weights are pickled") as caught:
        find_model(str(pipeline))
    assert caught.value.hint.endswith(f"{pipeline} {pipeline}-safetensors")
    assert len(to_safetensors(pipeline, tmp_path / "sd", lambda text: None)) == 2
    assert {path.name for path in (tmp_path / "sd").rglob("*model.safetensors")} == {
        "diffusion_pytorch_model.safetensors",
        "model.safetensors",
    }
    with pytest.raises(ModelError, match="no pickled weights"):
        to_safetensors(tmp_path / "sd", tmp_path / "more", lambda text: None)
