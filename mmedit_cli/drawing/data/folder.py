"""Subjects of one's own: a folder of photos each, and a subjects.yaml that says what they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mmedit_cli.drawing.data.base import Subject, SubjectSet, photos_of
from mmedit_cli.drawing.models.prompts import check_token
from mmedit_cli.errors import DataError, near_miss
from mmedit_cli.reading import read_yaml
from mmedit_cli.types import Concept

LIST = "subjects.yaml"
_PROMPTS = {
    "reliability": 1,
    "generality": 1,
    "locality": 0,
    "pair": 2,
}  # how many nouns each has
_EXAMPLE = "e.g. subjects: {teddy: {superclass: stuffed animal}}, with photos in teddy/; see docs/data.md"


def read(folder: Path) -> SubjectSet:
    """Return the subjects of a folder; raise DataError with all that is wrong with its subjects.yaml."""
    path = folder / LIST
    if not path.exists():
        raise DataError(f"{path}: not there, so this is no set of subjects", _EXAMPLE)
    content = read_yaml(path, hint=_EXAMPLE)
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("subjects"), dict)
        or not content["subjects"]
    ):
        raise DataError(f"{path}: no subjects in it", _EXAMPLE)
    known = ("subjects", *_PROMPTS)
    problems = [
        f"unknown key {str(key)!r}{near_miss(str(key), known)}"
        for key in content
        if key not in known
    ]
    told = {
        str(name): _told(str(name), given, problems)
        for name, given in content["subjects"].items()
    }
    tokens = [token for token, _ in told.values()]
    problems += [
        f"{token} names two subjects"
        for token in sorted({t for t in tokens if tokens.count(t) > 1})
    ]
    prompts = {
        key: _prompts(key, content[key], problems) for key in _PROMPTS if key in content
    }
    if problems:
        raise DataError([f"{path}: {problem}" for problem in problems[:20]], _EXAMPLE)
    photos = photos_of(folder, list(told))
    subjects = tuple(
        Subject(name, Concept(token, kind, photos[name]))
        for name, (token, kind) in told.items()
    )
    pair = {"pair": prompts.pop("pair")[0]} if "pair" in prompts else {}
    return SubjectSet(folder.resolve().name, subjects, **prompts, **pair)


def _told(name: str, given: Any, problems: list[str]) -> tuple[str, str]:
    """Return (token, superclass) of a subject."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,37}", name):
        problems.append(
            f"subjects.{name}: not the name of a folder (letters, digits, - and _)"
        )
    given = {"superclass": given} if isinstance(given, str) else given
    if not isinstance(given, dict) or not all(
        isinstance(value, str) for value in given.values()
    ):
        problems.append(f"subjects.{name}: expected superclass and, if you like, token")
        return "", ""
    problems += [
        f"subjects.{name}: unknown key {k!r}"
        for k in map(str, given)
        if k not in ("superclass", "token")
    ]
    token, kind = given.get("token", f"<{name}>"), given.get("superclass", "").strip()
    try:
        check_token(token)
    except DataError as error:
        problems += [f"subjects.{name}: {problem}" for problem in error.problems]
    if not kind or "<" in kind:
        problems.append(
            f"subjects.{name}.superclass: a word for what it is, such as dog"
        )
    return token, kind


def _prompts(key: str, given: Any, problems: list[str]) -> tuple[str, ...]:
    """Return the prompts of a key, each with as many {} as there are nouns in it."""
    prompts = (
        (given,)
        if isinstance(given, str)
        else tuple(given)
        if isinstance(given, list)
        else ()
    )
    wanted = _PROMPTS[key]
    if not prompts or (key == "pair" and len(prompts) > 1):
        problems.append(
            f"{key}: expected {'one prompt' if key == 'pair' else 'a list of prompts'}"
        )
    for prompt in prompts:
        if (
            not isinstance(prompt, str)
            or not prompt.strip()
            or prompt.count("{}") != wanted
        ):
            problems.append(
                f"{key}: {prompt!r} must be a text with {wanted} times {{}}"
            )
    return prompts
