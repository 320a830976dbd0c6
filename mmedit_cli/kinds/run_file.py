"""`--config FILE`: the options of a run file, in front of which those of the command line count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmedit_cli.errors import UserError, near_miss
from mmedit_cli.output import Output
from mmedit_cli.reading import read_yaml

OPTION = "--config"
_ARGUMENT = "editor"
_HINT = "a run.yaml of the records, or options by name: `sequential: 100`"


def take_file(args: Sequence[str]) -> tuple[list[str], Path | None]:
    """Return (arguments without `--config FILE`, the file); raise UserError where no file follows."""
    left = list(args)
    for place, word in enumerate(left):
        if word == OPTION:
            if place + 1 == len(left):
                raise UserError(f"{OPTION}: name a file", _HINT)
            file = Path(left[place + 1])
            return left[:place] + left[place + 2 :], file
        if word.startswith(f"{OPTION}="):
            _, _, named = word.partition("=")
            return left[:place] + left[place + 1 :], Path(named)
    return left, None


def read_options(file: Path) -> dict[str, Any]:
    """Return the options of a run file by their names on the command line; raise UserError for any other file.

    It is a mapping of options, or has one as `options`, like the run.yaml of a run. Other versions are said on stderr.
    """
    content = read_yaml(file, error=UserError, hint=_HINT)
    if not isinstance(content, Mapping):
        raise UserError(f"{file}: not a mapping of options", _HINT)
    if "config" not in content:
        return {str(key): value for key, value in content.items()}
    options = content.get("options")
    if not isinstance(options, Mapping):
        hint = "evaluations of knowledge from 0.2.0 on say theirs; write them by hand"
        raise UserError(f"{file}: this run says no options", hint)
    _say_versions(file, content["config"])
    return dict(options)


def _say_versions(file: Path, config: Any) -> None:
    """Say which versions made a run, where they are not those of here."""
    from mmedit_cli.runtime import versions

    made_with = config.get("versions", {}) if isinstance(config, Mapping) else {}
    here = versions()
    other = []
    for name, version in made_with.items():
        if here.get(name) != version:
            other.append(f"{name} {version} (here {here.get(name, 'none')})")
    if other:
        Output().note(f"{file}: made with {', '.join(other)}: scores may differ")


def as_words(
    file: Path, options: Mapping[str, Any], given: Mapping[str, Any], known: set[str]
) -> list[str]:
    """Return the options of a file as words of a command line, but for those that are given on it.

    given: what the command line says, by name. known: every option there is. Says on stderr where the two differ.
    Raises UserError for an option that is not known, or whose value is no text, number or list of these.
    """
    words: list[str] = []
    for name, value in options.items():
        option = f"--{name}"
        if name != _ARGUMENT and option not in known:
            near = near_miss(option, known)
            raise UserError(f"{file}: {name}: no such option{near}", _HINT)
        if name in given:
            _say_difference(file, name, value, given[name])
        elif name == _ARGUMENT:
            words.insert(0, _text(file, name, value))
        else:
            words += _words(file, name, value)
    return words


def _words(file: Path, name: str, value: Any) -> list[str]:
    """Return an option and its value as words; a list is joined by commas, or repeats `--set`."""
    option = f"--{name}"
    if value is True:
        return [option]
    if value is False or value is None:
        return []
    if not isinstance(value, list):
        return [option, _text(file, name, value)]
    texts = [_text(file, name, part) for part in value]
    if name != "set":
        return [option, ",".join(texts)]
    words = []
    for text in texts:
        words += [option, text]
    return words


def _text(file: Path, name: str, value: Any) -> str:
    if isinstance(value, str | int | float):
        return str(value)
    raise UserError(f"{file}: {name}: not a text, a number or a list of these", _HINT)


def _say_difference(file: Path, name: str, theirs: Any, ours: Any) -> None:
    """Say that the command line and a file differ, and which of them counts."""
    if name == "set":
        Output().note(f"{file}: set {theirs} is left out: the command line has --set")
        return
    shown = theirs
    if isinstance(theirs, list):
        shown = ",".join(map(str, theirs))
    if str(shown) != str(ours):
        Output().note(f"{name}: {ours}, as given here; {file} says {shown}")
