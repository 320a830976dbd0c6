"""What pyproject.toml allows, what constraints.txt pins, and what is installed fit each other."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, version

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BOUNDED = (
    "torch",
    "transformers",
    "diffusers",
    "peft",
    "accelerate",
    "huggingface-hub",
    "tokenizers",
    "typer",
    "gradio",
)
GROUPS = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
REQUIRED = {
    canonicalize_name(requirement.name): requirement
    for requirement in (
        Requirement(text) for texts in GROUPS.values() for text in texts
    )
}
PINS = {
    canonicalize_name(name): Version(pinned)
    for name, pinned in re.findall(
        r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
}


def installed(name: str) -> Version | None:
    try:
        return Version(version(name))
    except PackageNotFoundError:
        return None


def test_constraints_pin_packages_and_nothing_else():
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert len(lines) == len(PINS)
    assert not [
        name for name in PINS if name.startswith(("nvidia-", "cuda-", "triton"))
    ], "fits one kind of machine"
    assert not [name for name, pinned in PINS.items() if pinned.local], (
        "a build for one kind of machine"
    )


@pytest.mark.parametrize("name", REQUIRED)
def test_what_is_allowed_is_pinned(name):
    assert name in PINS, "scripts/renew_constraints.sh"
    assert PINS[name] in REQUIRED[name].specifier


@pytest.mark.parametrize("name", BOUNDED)
def test_bounds_end_at_the_tested_minor_version(name):
    major, minor = PINS[name].release[:2]
    assert f"{major}.{minor}.99" in REQUIRED[name].specifier
    assert f"{major}.{minor + 1}.0" not in REQUIRED[name].specifier


@pytest.mark.parametrize("name", [name for name in PINS if installed(name) is not None])
def test_what_is_installed_keeps_what_is_promised(name):
    """Bounds hold, and so does what each installed package asks of the others: a set that pip would refuse fails."""
    found = installed(name)
    if name in REQUIRED:
        assert found in REQUIRED[name].specifier, f"{name} {found} is installed"
    for text in distribution(name).requires or ():
        asked = Requirement(text)
        if asked.marker is not None and not asked.marker.evaluate({"extra": ""}):
            continue
        other = installed(asked.name)
        assert other is not None, (
            f"{name} asks for {asked.name}, which is not installed"
        )
        assert asked.specifier.contains(other, prereleases=True), (
            f"{name} asks for {asked}, {other} is installed"
        )


def test_all_that_is_needed_is_installed():
    needed = (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"])
    assert not [text for text in needed if installed(Requirement(text).name) is None]
