"""The script that trains mini-smol: rows that are packed, a stop that changes nothing, parts that make the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import ROOT, imported_scripts
from safetensors.torch import load_file, save_file

from mmedit_cli import assembled, runtime
from mmedit_cli.knowledge.models.shared import tiny

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
TOWER = ROOT / "data" / "models" / "mini-llava"


@pytest.fixture(scope="module")
def scripts():
    """The modules of the scripts, imported as the scripts do."""
    with imported_scripts(
        common="mini_training",
        runs="mini_runs",
        training="mini_smol_training",
        train="train_mini_smol",
    ) as modules:
        runtime.quiet_libraries()
        yield modules


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """The folder of a small language model of random weights."""
    folder = tmp_path_factory.mktemp("language")
    model, tokenizer, _ = tiny.build("tiny-llama-lm")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(scripts, language):
    """The quick recipe with the small language model and single passes."""
    path = ROOT / "scripts" / "mini_smol.yaml"
    quick = scripts.training.Recipe.read(path, quick=True)
    stages = {name: replace(stage, passes=2) for name, stage in quick.stages.items()}
    return replace(quick, language=str(language), stages=stages)


def run(scripts, recipe, out, *stops):
    """Train in as many goes as there are stops, and to the end."""
    for steps in (*stops, None):
        finished = scripts.train.train(
            recipe,
            out,
            device=CPU,
            stages=scripts.training.STAGES,
            stop=scripts.runs.Stop(steps=steps),
        )
    assert finished
    return load_file(out / recipe.name / "parts.safetensors")


@pytest.fixture(scope="module")
def parts(scripts, recipe, tmp_path_factory):
    return run(scripts, recipe, tmp_path_factory.mktemp("whole"))


def test_a_stop_changes_nothing(scripts, recipe, parts, tmp_path):
    again = run(scripts, recipe, tmp_path, 3, 7)
    assert again.keys() == parts.keys()
    for name, value in parts.items():
        assert torch.equal(again[name], value), name


def test_parts_are_what_was_trained(recipe, language, parts):
    """Every layer of the language model, the last two of the tower, and the projector are other than at first."""
    model, _, _ = assembled.build(language, TOWER)
    before = {name: value.clone() for name, value in model.named_parameters()}
    assembled.put_in(model, parts, TOWER)
    changed = {
        name
        for name, value in model.named_parameters()
        if not torch.equal(value, before[name])
    }
    assert any("language_model.layers.0.self_attn.q_proj" in name for name in changed)
    assert any("multi_modal_projector.linear_2.weight" in name for name in changed)
    layers = {
        int(name.split("layers.")[1].split(".")[0])
        for name in changed
        if "vision_tower" in name
    }
    assert layers == set(recipe.layers)


def test_a_run_starts_from_parts(scripts, recipe, parts, tmp_path):
    """Before its first step, a run that starts from parts would write them again."""
    stages = {name: replace(stage, passes=0) for name, stage in recipe.stages.items()}
    file = tmp_path / "parts.safetensors"
    save_file(parts, file)
    scripts.train.train(
        replace(recipe, stages=stages),
        tmp_path,
        device=CPU,
        stages=("joint",),
        stop=scripts.runs.Stop(),
        parts_from=file,
    )
    again = load_file(tmp_path / recipe.name / "parts.safetensors")
    before, after = assembled.unpacked(parts), assembled.unpacked(again)
    for name, value in before.items():
        assert torch.allclose(after[name], value, atol=1e-6), name


def test_questions_in_a_row_do_not_see_each_other(scripts):
    rows = scripts.training.PackedRows(
        [[([5, 6, 7], 1), ([8, 9, 10, 11], 2)], [([12, 13], 1)]], [[0, 1], [2]], 2
    )
    assert rows.ids.tolist() == [
        [0, 0, 5, 6, 7, 8, 9, 10, 11],
        [0, 0, 12, 13, 0, 0, 0, 0, 0],
    ]
    assert rows.positions[0].tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5]
    sees = rows.mask(torch.float32)[0, 0] == 0
    assert sees[6].nonzero()[:, 0].tolist() == [0, 1, 5, 6]
    assert sees[1].nonzero()[:, 0].tolist() == [0, 1]
    assert rows.answers.tolist() == [7, 10, 11, 13]
    assert rows.predicting.nonzero().tolist() == [[0, 3], [0, 6], [0, 7], [1, 2]]
    assert rows.question_of.tolist() == [0, 1, 1, 2]


def test_a_packed_question_is_read_as_if_it_were_alone(scripts, language):
    model, tokenizer, _ = assembled.build(language, TOWER)
    reader = model.model.language_model
    reader.set_attn_implementation("eager")
    first = tokenizer("What is this?")["input_ids"]
    second = tokenizer("Name the capital of Peru.")["input_ids"]
    rows = scripts.training.PackedRows([[(first, 1), (second, 1)]], [[0, 1]], 3)
    picture = torch.randn(1, 3, reader.config.hidden_size)
    words = model.get_input_embeddings()

    def read(ids, **options):
        embeds = torch.cat((picture, words(torch.tensor([ids]))), 1)
        return reader(inputs_embeds=embeds, **options).last_hidden_state[0]

    with torch.no_grad():
        alone = read(second)[3:]
        packed = read(
            first + second,
            attention_mask=rows.mask(torch.float32),
            position_ids=rows.positions,
        )[3 + len(first) :]
    assert torch.allclose(alone, packed, atol=1e-5)
