"""Hyper-parameter files: what is accepted, how it is merged, and that every mistake is named with its place."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from mmedit_cli.errors import HparamsError
from mmedit_cli.hparams import describe, load_hparams, to_dict


@dataclass(frozen=True)
class Optim:
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class Hparams:
    learning_rate: float = 1e-3
    steps: int = 5
    mode: Literal["on", "off", "auto"] = "auto"
    optim: Optim = Optim(lr=1e-5)
    schedule: Optim | None = None
    layers: tuple[int, ...] = ()
    names: list[str] | None = None
    weights: dict[str, float] = field(default_factory=lambda: {"a": 1.0})
    window: int | Literal["all"] = "all"
    verbose: bool = False
    prompt: str = ""

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError("steps must not\nbe negative")


@dataclass(frozen=True)
class Required:
    rate: float
    inner: Optim


Load = Callable[..., Hparams]
Problems = Callable[..., list[str]]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ft.yaml"

    def load(
        text: str | bytes,
        *overrides: str,
        variant: str | None = None,
        cls: type = Hparams,
    ) -> Hparams:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return load_hparams(path, cls, variant=variant, overrides=overrides)

    return load


@pytest.fixture
def problems(load: Load) -> Problems:
    def problems(*args: str | bytes, cls: type = Hparams) -> list[str]:
        with pytest.raises(HparamsError) as caught:
            load(*args, cls=cls)
        assert caught.value.hint.startswith("valid keys: ")
        assert not any("\n" in problem for problem in caught.value.problems)
        return list(caught.value.problems)

    return problems


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "{}", "\ufeff"])
def test_an_empty_file_gives_the_defaults(load: Load, text: str) -> None:
    assert load(text) == Hparams()


def test_every_type_is_read(load: Load) -> None:
    hparams = load(
        "learning_rate: 1e-4\nsteps: 1_000\nmode: on\noptim: {lr: 1, betas: [0, .5]}\nschedule:\n  lr: 2.5E+3\n"
        "layers: [1, 2]\nnames: [x, '1']\nweights: {b: 2}\nwindow: 3\nverbose: yes\nprompt: 1e-4\n"
    )
    assert hparams == Hparams(
        learning_rate=1e-4,
        steps=1000,
        mode="on",
        optim=Optim(1.0, (0.0, 0.5)),
        schedule=Optim(2500.0),
        layers=(1, 2),
        names=["x", "1"],
        weights={"a": 1.0, "b": 2.0},
        window=3,
        verbose=True,
        prompt="1e-4",
    )
    assert type(hparams.optim.lr) is float
    assert load("names: null\nschedule: ~").names is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 3.0", "steps: expected a whole number, got 3.0"),
        ("steps: '25'", "steps: expected a whole number, got '25'"),
        ("steps: true", "steps: expected a whole number, got true"),
        ("steps: 010", "steps: expected a whole number, got 010"),
        ("steps: 1:30", "steps: expected a whole number, got 1:30"),
        ("steps: 1_", "steps: expected a whole number, got 1_"),
        ("steps: null", "steps: expected a whole number, got null"),
        (
            "learning_rate: '1e-4'",
            "learning_rate: expected a finite number, got '1e-4'",
        ),
        ("learning_rate: .nan", "learning_rate: expected a finite number, got .nan"),
        ("learning_rate: -.inf", "learning_rate: expected a finite number, got -.inf"),
        ("learning_rate: nan", "learning_rate: expected a finite number, got 'nan'"),
        (
            "learning_rate: 1e999",
            "learning_rate: expected a finite number, got '1e999'",
        ),
        ("learning_rate: false", "learning_rate: expected a finite number, got false"),
        ("verbose: 1", "verbose: expected true or false, got 1"),
        ("verbose: 'true'", "verbose: expected true or false, got 'true'"),
        ("prompt: 5", "prompt: expected text in quotes, got 5"),
        (
            "mode: atuo",
            "mode: expected 'on' | 'off' | 'auto', got 'atuo' (did you mean auto?)",
        ),
        ("window: most", "window: expected int | 'all', got 'most'"),
        ("optim: 5", "optim: expected a mapping, got 5"),
        (
            "optim: {betas: [1]}",
            "optim.betas: expected tuple[float, float], got a list of 1",
        ),
        ("schedule: {lr: x}", "schedule.lr: expected a finite number, got 'x'"),
        ("layers: [1, x]", "layers[1]: expected a whole number, got 'x'"),
        ("layers: 1", "layers: expected tuple[int, ...], got 1"),
        ("weights: [1]", "weights: expected dict[str, float], got a list of 1"),
        ("weights: {a: b}", "weights.a: expected a finite number, got 'b'"),
        ("steps:\n  a: 1", "steps: expected a whole number, got a mapping"),
        ("step: 1", "step: unknown key (did you mean steps?)"),
        ("optim: {lrr: 1}", "optim.lrr: unknown key (did you mean lr?)"),
        ("variants: 3", "variants: expected dict[str, Hparams], got 3"),
        (
            "variants: {a: {step: 1}}",
            "variants.a.step: unknown key (did you mean steps?)",
        ),
        ("1: 2", "a key must be text, got 1"),
        ("optim: {true: 2}", "optim: a key must be text, got true"),
        ('"a\\e[1m\\n": 2', "a\\x1b[1m\\n: unknown key"),
    ],
)
def test_one_mistake(problems: Problems, text: str, message: str) -> None:
    line = 2 if text.startswith("steps:\n") else 1
    assert problems(text) == [f"ft.yaml:{line}: {message}"]


def test_all_mistakes_are_reported_at_once_with_their_lines(problems: Problems) -> None:
    text = "learning_rte: 1\nsteps: 2\nsteps: x\nvariants:\n  other:\n    mode: of\n? [a]\n: 1\n"
    assert problems(
        text, "learning_rte=1", "optim.lr=abc", "steps", "=1", "layers=[1"
    ) == [
        "ft.yaml:1: learning_rte: unknown key (did you mean learning_rate?)",
        "ft.yaml:3: steps: given twice, first in line 2",
        "ft.yaml:6: variants.other.mode: expected 'on' | 'off' | 'auto', got 'of' (did you mean off?)",
        "ft.yaml:7: a key must be text, got a list of 1",
        "--set learning_rte=1: unknown key 'learning_rte' in ft.yaml (did you mean learning_rate?)",
        "--set optim.lr=abc: optim.lr in ft.yaml: expected a finite number, got 'abc'",
        "--set steps: expected key=value",
        "--set =1: expected key=value",
        "--set layers=[1: not valid YAML: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'",
    ]


def test_precedence_and_deep_merge(load: Load) -> None:
    text = (
        "optim: {betas: [0, 0]}\nsteps: 2\n"
        "variants:\n  llava: {optim: {lr: 3}, weights: {b: 2}}\n  other: {steps: 9}\n"
    )
    assert load(text) == Hparams(steps=2, optim=Optim(1e-5, (0.0, 0.0)))
    assert load(text, variant="unheard-of") == load(text)
    assert load(text, variant="other").steps == 9
    merged = load(
        text, "optim.lr=4", "weights.c=3", "steps=7", "steps=8", variant="llava"
    )
    assert merged == Hparams(
        steps=8, optim=Optim(4.0, (0.0, 0.0)), weights={"a": 1.0, "b": 2.0, "c": 3.0}
    )


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("steps=25", "steps", 25),
        ("steps='25'", "steps", 25),
        (" learning_rate = 1e-4 ", "learning_rate", 1e-4),
        ("layers=[1, 2]", "layers", (1, 2)),
        ("schedule.lr=1", "schedule", Optim(1.0)),
        ("schedule={lr: 1}", "schedule", Optim(1.0)),
        ("schedule=null", "schedule", None),
        ("window=all", "window", "all"),
        ("mode=off", "mode", "off"),
        ("prompt=What: is # this = 1?", "prompt", "What: is # this = 1?"),
        ("prompt=25", "prompt", "25"),
        ("prompt=", "prompt", ""),
    ],
)
def test_set(load: Load, override: str, name: str, value: object) -> None:
    assert (
        getattr(load("schedule: {lr: 9}" if value is None else "", override), name)
        == value
    )


def test_missing_fields_and_post_init(problems: Problems) -> None:
    assert problems("", cls=Required) == [
        "ft.yaml: rate: required, but not given",
        "ft.yaml: inner: required, but not given",
    ]
    assert problems("rate: x\ninner: {}", cls=Required) == [
        "ft.yaml:1: rate: expected a finite number, got 'x'",
        "ft.yaml: inner.lr: required, but not given",
    ]
    assert problems("steps: -1") == ["ft.yaml: steps must not\\nbe negative"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: 1\nb: [1\nc: 2\n",
            "ft.yaml:3: not valid YAML: while parsing a flow sequence, expected ',' or ']'",
        ),
        (
            "a: 'x\n",
            "ft.yaml:2: not valid YAML: while scanning a quoted scalar, found unexpected end of stream",
        ),
        ("a: 1\n\0", "ft.yaml:2: not valid YAML: special characters are not allowed"),
        ("--- {}\n--- {}\n", "ft.yaml:2: not valid YAML: expected a single document"),
        ("- 1", "ft.yaml:1: the top level must be a mapping, got a list of 1"),
        ("steps: &x 1", "ft.yaml:1: anchors and aliases are not supported"),
        ("steps: 1\nx: *x", "ft.yaml:2: anchors and aliases are not supported"),
        (
            "steps: !!python/object:os.system 1",
            "ft.yaml:1: tags are not supported: tag:yaml.org,2002:python",
        ),
        ("steps: !mine 1", "ft.yaml:1: tags are not supported: !mine"),
        ("<<: {steps: 1}", "ft.yaml:1: a key must be text, got <<"),
        ("[" * 5000, "ft.yaml:1: nested deeper than 20 levels"),
        ("- " * 5000, "ft.yaml:1: nested deeper than 20 levels"),
        ("steps: " + "9" * 5000, "ft.yaml:1: steps: expected a whole number, got 9999"),
    ],
)
def test_bad_yaml(problems: Problems, text: str, message: str) -> None:
    assert problems(text)[0].startswith(message)


def test_bad_files(load: Load, tmp_path: Path) -> None:
    def problem(path: Path) -> str:
        with pytest.raises(HparamsError) as caught:
            load_hparams(path, Hparams)
        return str(caught.value)

    load("")
    assert (
        problem(tmp_path / "tf.yaml") == "tf.yaml: no such file (did you mean ft.yaml?)"
    )
    assert problem(tmp_path / "no" / "ft.yaml") == f"no{os.sep}ft.yaml: no such file"
    assert problem(tmp_path) == ".: is a folder, not a YAML file"
    assert problem(tmp_path.parent / "x.yaml").startswith(str(tmp_path.parent))
    with pytest.raises(HparamsError, match=r"ft.yaml:1: not UTF-8 \(byte 3\)"):
        load(b"a: \xff")
    with pytest.raises(HparamsError, match="larger than 1 MiB"):
        load("#" * (1 << 20) + "\n")


def test_to_dict_reads_back(load: Load) -> None:
    hparams = Hparams(layers=(1, 2), schedule=Optim(1.0))
    plain = to_dict(hparams)
    assert plain["layers"] == [1, 2]
    assert plain["schedule"] == {"lr": 1.0, "betas": [0.9, 0.999]}
    assert load(json.dumps(plain)) == hparams


def test_describe_lists_what_set_takes(load: Load) -> None:
    rows = describe(Hparams)
    assert ("optim.lr", "float", "1e-05") in rows
    assert ("schedule", "Optim | None", "null") in rows
    assert ("mode", "'on' | 'off' | 'auto'", '"auto"') in rows
    assert ("layers", "tuple[int, ...]", "[]") in rows
    assert describe(Required)[:2] == [
        ("rate", "float", "required"),
        ("inner.lr", "float", "required"),
    ]
    assert load("", *(f"{name}={default}" for name, _, default in rows)) == Hparams()


def test_a_type_that_cannot_be_read_is_the_programmers_error(load: Load) -> None:
    odd = dataclasses.make_dataclass("odd", [("x", complex)])
    with pytest.raises(TypeError, match="complex"):
        load("x: 1", cls=odd)
