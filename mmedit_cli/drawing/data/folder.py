"""A user's own subjects: a folder of photos for each, and a subjects.yaml that describes them."""

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
_NOUNS = {"reliability": 1, "generality": 1, "locality": 0, "pair": 2}  # of a prompt
_EXAMPLE = "e.g. subjects: {teddy: {superclass: stuffed animal}}, with photos in teddy/; see docs/data.md"


def read(folder: Path) -> SubjectSet:
    """Return the subjects of a folder; raise DataError with all that is wrong with its subjects.yaml."""
    path = folder / LIST
    if not path.exists():
        raise DataError(f"{path}: not there, so this is no set of subjects", _EXAMPLE)
    content = read_yaml(path, hint=_EXAMPLE)
    listed = content.get("subjects") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise DataError(f"{path}: no subjects in it", _EXAMPLE)
    problems = _unknown_keys(content)
    described: dict[str, tuple[str, str]] = {}
    for name, given in listed.items():
        described[str(name)] = _describe(str(name), given, problems)
    problems += _repeated([token for token, _ in described.values()])
    prompts: dict[str, Any] = {}
    for key in _NOUNS:
        if key in content:
            prompts[key] = _prompts(key, content[key], problems)
    if problems:
        raise DataError([f"{path}: {problem}" for problem in problems[:20]], _EXAMPLE)
    if "pair" in prompts:
        prompts["pair"] = prompts["pair"][0]
    photos = photos_of(folder, list(described))
    subjects = []
    for name, (token, superclass) in described.items():
        concept = Concept(token, superclass, photos[name])
        subjects.append(Subject(name, concept))
    return SubjectSet(folder.resolve().name, tuple(subjects), **prompts)


def _repeated(tokens: list[str]) -> list[str]:
    problems = []
    for token in sorted(set(tokens)):
        if tokens.count(token) > 1:
            problems.append(f"{token} names two subjects")
    return problems


def _unknown_keys(content: dict[Any, Any]) -> list[str]:
    known = ("subjects", *_NOUNS)
    problems = []
    for key in content:
        if key not in known:
            text = str(key)
            problems.append(f"unknown key {text!r}{near_miss(text, known)}")
    return problems


def _describe(name: str, given: Any, problems: list[str]) -> tuple[str, str]:
    """Return (token, superclass) of a subject; what is wrong is added to the problems."""
    place = f"subjects.{name}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,37}", name):
        problems.append(f"{place}: not the name of a folder (letters, digits, - and _)")
    if isinstance(given, str):
        given = {"superclass": given}
    if not isinstance(given, dict) or not all(
        isinstance(value, str) for value in given.values()
    ):
        problems.append(f"{place}: expected superclass and, if you like, token")
        return "", ""
    for key in map(str, given):
        if key not in ("superclass", "token"):
            problems.append(f"{place}: unknown key {key!r}")
    token = given.get("token", f"<{name}>")
    superclass = given.get("superclass", "").strip()
    try:
        check_token(token)
    except DataError as error:
        problems += [f"{place}: {problem}" for problem in error.problems]
    if not superclass or "<" in superclass:
        problems.append(f"{place}.superclass: a word for what it is, such as dog")
    return token, superclass


def _prompts(key: str, given: Any, problems: list[str]) -> tuple[str, ...]:
    """Return the prompts of a key, each with as many {} as it needs nouns; what is wrong is added to the problems."""
    prompts: tuple[Any, ...] = ()
    if isinstance(given, str):
        prompts = (given,)
    elif isinstance(given, list):
        prompts = tuple(given)
    single = key == "pair"
    if not prompts or (single and len(prompts) > 1):
        expected = "one prompt" if single else "a list of prompts"
        problems.append(f"{key}: expected {expected}")
    nouns = _NOUNS[key]
    for prompt in prompts:
        is_text = isinstance(prompt, str) and prompt.strip()
        if not is_text or prompt.count("{}") != nouns:
            problems.append(f"{key}: {prompt!r} must be a text with {nouns} times {{}}")
    return prompts
