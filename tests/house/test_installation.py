"""What `mmedit doctor` says of an installation: the pair of versions that does not fit is named."""

from __future__ import annotations

import importlib

from mmedit_cli import installation


def test_versions_that_do_not_fit_are_named(monkeypatch):
    real = installation._distribution
    assert [finding[1] for finding in installation._misfits()] == [True]

    def other(package):
        version, requires = real(package)
        if package == "transformers":
            requires = [*requires, "peft>=0.99"]
        return ("0.1", requires) if package == "tokenizers" else (version, requires)

    monkeypatch.setattr(installation, "_distribution", other)
    said = [found for _, ok, found in installation._misfits() if not ok]
    transformers, peft = real("transformers")[0], real("peft")[0]
    assert (
        f"transformers {transformers} asks for peft>=0.99, but peft {peft} is installed"
        in said
    )
    assert any(
        line.startswith("mmedit-cli")
        and line.endswith("but tokenizers 0.1 is installed")
        for line in said
    )


def test_a_package_that_cannot_be_imported_stops_what_needs_it(monkeypatch):
    real = importlib.import_module

    def broken(name, package=None):
        if name == "peft":
            raise RuntimeError("undefined symbol\nat length")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", broken)
    rows = list(installation.check())
    assert ("peft", False, "cannot be imported: undefined symbol") in rows
    assert not [name for name, _, _ in rows if name == "a LoRA"]


def test_what_is_listed_is_tried_out(monkeypatch):
    rows = {name: (ok, found) for name, ok, found in installation.check()}
    for name in ("a LoRA", "a pipeline", "a hub file"):
        assert rows[name][0] is True, rows[name]
    assert rows["other programs"][0] is not False, (
        "mmedit needs no adapter methods of others"
    )

    def refuse(*_args, **_options):
        raise ValueError("peft has changed")

    monkeypatch.setattr("peft.inject_adapter_in_model", refuse)
    name, ok, found = installation._tried(
        "a LoRA", ("peft", "transformers"), installation._lora
    )
    assert (name, ok) == ("a LoRA", False)
    assert found.startswith("peft 0.")
    assert found.endswith("do not work together: peft has changed")
