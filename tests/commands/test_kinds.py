"""A command knows the kind of the method that is named: its help, its options, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import typer
from conftest import ROOT

from mmedit_cli.errors import UnknownName
from mmedit_cli.kinds import (
    KINDS,
    kind_of_data,
    kind_of_folder,
    kind_of_method,
    kinds_with,
)
from mmedit_cli.kinds.concept_editing import CONCEPT_EDITING
from mmedit_cli.kinds.drawing import DRAWING
from mmedit_cli.kinds.knowledge import KNOWLEDGE
from mmedit_cli.kinds.picture_editing import PICTURE_EDITING
from mmedit_cli.records import CONCEPT_EDITS, CONCEPT_INDEX

NAMED = {  # a method of each kind
    "an editor": "ft",
    "a personalizer": "perfusion",
    "a concept editor": "uce",
    "an image editor": "instruct-pix2pix",
}
METHOD_TASKS = ("eval", "edit", "train-editor")
FOLDER_TASKS = ("edits list", "edits undo", "edits export")


def params_of(kind, task: str) -> dict:
    """The options of a kind's function, by spelling."""
    single = typer.Typer(add_completion=False)
    single.command()(kind.commands[task])
    built = typer.main.get_command(single)
    return {param.opts[0]: param for param in built.params if "-" in param.opts[0]}


def options_in(text: str) -> set[str]:
    """The long options that have a line of their own in a help text."""
    return set(re.findall(r"^ +(?:-\w, )?(--[a-z-]+)", text, flags=re.MULTILINE))


@pytest.mark.parametrize(
    ("task", "kind"),
    [(task, kind) for task in METHOD_TASKS for kind in kinds_with(task)],
    ids=lambda value: value if isinstance(value, str) else value.method.one,
)
def test_the_help_shows_what_applies_to_a_kind_and_nothing_else(cli, task, kind):
    code, text, _ = cli(task, NAMED[kind.method.one], "--help")
    assert code == 0
    assert options_in(text) == {*params_of(kind, task), "--help"}


def test_the_help_of_perfusion_names_its_own_defaults(cli):
    _, text, _ = cli("eval", "perfusion", "--help")
    assert "--sequential" not in text
    assert "--template" not in text
    assert "emojikb-concepts" in text
    assert "eval.seeds=4" in text


@pytest.mark.parametrize("task", METHOD_TASKS)
def test_without_a_method_the_help_shows_the_options_of_all_kinds(cli, task):
    code, text, _ = cli(task, "--help")
    everything = {name for kind in kinds_with(task) for name in params_of(kind, task)}
    assert code == 0
    assert options_in(text) == {*everything, "--help"}
    for kind in kinds_with(task):
        assert kind.method.many in text


def refused():
    """Every (task, kind, option) where another kind of the task takes the option."""
    for task in (*METHOD_TASKS, *FOLDER_TASKS):
        for kind in kinds_with(task):
            own = params_of(kind, task)
            others = [params_of(other, task) for other in kinds_with(task)]
            for name, param in {k: v for o in others for k, v in o.items()}.items():
                if name not in own:
                    yield task, kind, name, param.is_flag


@pytest.mark.parametrize(
    ("task", "kind", "option", "is_flag"),
    list(refused()),
    ids=lambda value: value.method.one if hasattr(value, "method") else str(value),
)
def test_an_option_of_another_kind_is_refused(
    cli, tmp_path, task, kind, option, is_flag
):
    named = NAMED[kind.method.one]
    if task in FOLDER_TASKS:
        named = tmp_path / "kept"
        named.mkdir()
        index = {
            DRAWING.method.one: CONCEPT_INDEX,
            CONCEPT_EDITING.method.one: CONCEPT_EDITS,
        }
        (named / index.get(kind.method.one, "run.yaml")).write_text("{}")
    given = (option,) if is_flag else (option, "1")
    code, text, errors = cli(*task.split(), named, *given)
    noun = kind.folder if task in FOLDER_TASKS else kind.method
    assert (code, text) == (2, "")
    assert errors.splitlines() == [
        f"error: {option}: means nothing to {noun.one}",
        f"hint: mmedit {task} {named} --help lists what it takes",
    ]


def test_options_may_stand_before_the_method(cli):
    code, _, errors = cli("eval", "--sequential", 3, "-n", "2", "perfusion")
    assert code == 2
    assert errors.startswith("error: --sequential: means nothing to a personalizer")


def test_several_are_named_in_one_line(cli):
    code, _, errors = cli("eval", "mgie", "--dry-run", "--root", "x")
    assert code == 2
    assert "error: --root, --dry-run: means nothing to an image editor" in errors


def test_the_environment_is_not_an_option_that_was_given(cli, monkeypatch):
    monkeypatch.setenv("MMEDIT_RECORDS", "elsewhere")
    code, _, errors = cli("edit", "perfusion", "--into", "nowhere")
    assert code == 2
    assert errors.startswith("error: nothing to learn")


def test_an_unknown_option_is_no_method(cli):
    code, _, errors = cli("eval", "--nonsense")
    assert code == 2
    assert "No such option" in errors
    assert "--nonsense" in errors


def test_help_of_a_kind_loads_no_torch():
    code = (
        "import sys\nfrom mmedit_cli.app import main\n"
        f"for name in {tuple(NAMED.values())}:\n    main(['eval', name, '--help'])\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True
    )


def test_a_method_has_the_kind_whose_registry_names_it():
    for kind in KINDS:
        task = "eval" if "eval" in kind.commands else "edit"
        for name in kind.registry.names():
            assert kind_of_method(name, task) is kind
            assert kind_of_method(name.replace("-", "_"), task) is kind
    with pytest.raises(UnknownName, match="unknown editor 'mgie'"):
        kind_of_method("mgie", "edit")


def test_a_folder_has_the_kind_of_its_edits(tmp_path):
    assert kind_of_folder(tmp_path, "edits undo") is KNOWLEDGE
    (tmp_path / CONCEPT_INDEX).touch()
    assert kind_of_folder(tmp_path, "edits undo") is DRAWING
    assert kind_of_folder(tmp_path, "edits redo") is KNOWLEDGE
    (tmp_path / CONCEPT_INDEX).unlink()
    (tmp_path / CONCEPT_EDITS).touch()
    assert kind_of_folder(tmp_path, "edits redo") is CONCEPT_EDITING


def test_data_have_a_kind(tmp_path):
    assert kind_of_data("emojikb-edits:val") is PICTURE_EDITING
    assert kind_of_data("dreambooth") is DRAWING
    assert kind_of_data("emojikb") is KNOWLEDGE
    assert kind_of_data(str(tmp_path)) is KNOWLEDGE
    (tmp_path / "subjects.yaml").touch()
    assert kind_of_data(str(tmp_path)) is DRAWING


def test_the_list_has_a_table_for_every_kind(cli):
    code, text, _ = cli("list", "--json")
    found = json.loads(text)
    assert code == 0
    assert list(found) == [*(kind.method.many for kind in KINDS), "models", "data"]
    for kind in KINDS:
        names = [next(iter(row.values())) for row in found[kind.method.many]]
        assert names == kind.registry.names()
