"""The library as a program uses it: names, defaults, what objects say of themselves, models in memory."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from conftest import QUERIES, ROOT, TEXTS

import mmedit_cli
from mmedit_cli import (
    EditOptions,
    EvalOptions,
    ModelOptions,
    Protocol,
    Query,
    UserError,
    load_backbone,
    load_editor,
)


def test_everything_public_is_listed_and_there():
    assert set(mmedit_cli.__all__) - {"__version__"} == set(mmedit_cli._PUBLIC)
    assert set(mmedit_cli.__all__) <= set(dir(mmedit_cli))
    for name in mmedit_cli.__all__:
        assert getattr(mmedit_cli, name)
    with pytest.raises(AttributeError, match="no attribute 'Protokoll'"):
        _ = mmedit_cli.Protokoll


def test_options_have_the_defaults_of_the_commands():
    options = EvalOptions("ft")
    assert (options.data, options.protocol) == ("emojikb", Protocol())
    assert options.model == EditOptions("ft").model == ModelOptions()
    assert ModelOptions().named == "mini-blip2"
    assert "protocol=Protocol(sequential=1" in repr(options)


def test_objects_say_what_they_are():
    model = load_backbone("tiny-llava", device="cpu")
    assert re.fullmatch(
        r"<Llava tiny-llava: \d+ layers of \d+, float32 on cpu>", repr(model)
    )
    editor = load_editor("ft", model, overrides=("steps=1",))
    with editor.edit(QUERIES[:1]) as made:
        assert repr(made) == "<edits 1 of <ft on tiny-llava: 1 edit>>"


def loaded(folder, *, sees: bool):
    """A model of transformers and its processor, as its own functions load them."""
    import transformers as hf

    kind = hf.AutoModelForImageTextToText if sees else hf.AutoModelForCausalLM
    model = kind.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, dtype="float32"
    )
    words = hf.AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    if not sees:
        return model, words
    images = hf.AutoImageProcessor.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, backend="pil"
    )
    return model, hf.LlavaProcessor(images, words, patch_size=14)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a model that sees and of one that reads, as `save_pretrained` writes them."""
    from mmedit_cli.knowledge.models.shared import tiny

    found = {}
    for name in ("tiny-llava", "tiny-llama-lm"):
        folder = tmp_path_factory.mktemp("models") / name
        model, tokenizer, images = tiny.build(name)
        for part in (model, tokenizer, images):
            if part is not None:
                part.save_pretrained(folder)
        found[name] = folder
    return found


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-llama-lm"])
def test_a_model_that_is_loaded_answers_as_its_folder_does(folders, name):
    folder = folders[name]
    asked = QUERIES if name == "tiny-llava" else TEXTS
    by_path = load_backbone(folder, device="cpu")
    model, processor = loaded(folder, sees=by_path.sees)
    given = load_backbone(model, processor)
    assert given.model is model
    assert (given.name, type(given)) == (name, type(by_path))
    texts = by_path.generate(asked, max_new_tokens=4)
    assert given.generate(asked, max_new_tokens=4) == texts
    again = load_backbone(*loaded(folder, sees=by_path.sees))
    assert given.fingerprint == again.fingerprint != by_path.fingerprint
    with torch.no_grad():
        model.get_input_embeddings().weight[0] += 1
    assert load_backbone(model, processor).fingerprint != given.fingerprint


def test_a_model_that_is_loaded_takes_the_networks_of_the_one_it_is(
    monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "library.md").read_text()
    _, code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "library.md", "exec"), names)
    assert capsys.readouterr().out == "['red balloon']\n"
    backbone, apple = names["backbone"], names["apple"]
    asked = Query("What is this?", image=apple)
    assert backbone.generate([asked]) == ["red apple"]
    with pytest.raises(UserError, match="of another shape"):
        load_backbone(names["model"], names["processor"], same_as="mini-llava")


def test_what_cannot_be_wrapped_is_named(folders):
    model, processor = loaded(folders["tiny-llava"], sees=True)
    with pytest.raises(UserError, match="tiny-llava: a model that is loaded needs its"):
        load_backbone(model)
    with pytest.raises(UserError, match="needs its processor"):
        load_backbone(model, processor.tokenizer)
    with pytest.raises(UserError, match="a Linear is no model of transformers"):
        load_backbone(torch.nn.Linear(2, 2), processor)
    with pytest.raises(UserError, match="device: the model is loaded already"):
        load_backbone(model, processor, device="cpu")
    other = loaded(folders["tiny-llama-lm"], sees=False)[1]
    other.add_tokens([f"<{i}>" for i in range(9000)])
    with pytest.raises(UserError, match="the tokenizer has"):
        load_backbone(model, type(processor)(processor.image_processor, other))
