"""Every YAML in hparams/ belongs to an editor and is right, for the defaults and for each of its variants."""

from __future__ import annotations

import pytest
import yaml
from conftest import ROOT

from mmedit_cli import registry
from mmedit_cli.hparams import describe, load_hparams

FILES = sorted((ROOT / "hparams").rglob("*.yaml"))


def test_each_editor_has_its_file():
    images = registry.image_editors
    names = (
        *registry.editors.names(),
        *registry.personalizers.names(),
        *registry.concept_editors.names(),
        *(name for name in images.names() if images.get(name).trains),
    )
    assert {registry.hparams_file(name) for name in names} == set(FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_file_is_right(path):
    cls = hparams_of(path.stem)
    content = yaml.safe_load(path.read_text())
    for variant in (None, *content.get("variants", {})):
        load_hparams(path, cls, variant=variant)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_file_names_every_value_and_says_where_it_comes_from(path):
    cls = hparams_of(path.stem)
    text = path.read_text()
    keys = {name for name, _, _ in describe(cls)}
    assert keys == set(
        named({k: v for k, v in yaml.safe_load(text).items() if k != "variants"})
    )
    last = {key.rpartition(".")[2] for key in keys}
    for line in text.partition("\nvariants:")[0].splitlines():
        if line.partition(":")[0].strip() in last:
            assert "#" in line, f"no comment: {line}"


def hparams_of(name):
    known = registry.METHODS
    return (
        next(r for r in known if name.replace("_", "-") in r.names()).get(name).Hparams
    )


def named(content, prefix=""):
    """The keys of nested mappings, joined with dots."""
    for key, value in content.items():
        yield from (
            named(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else (prefix + key,)
        )
