"""Hyper-parameters: a YAML file becomes a frozen dataclass, strictly, with every problem reported at once.

Lowest first: the defaults of the dataclass, the top-level keys of the file, its `variants: {<name>: {...}}` entry,
`--set key=value`. Mappings merge key by key, everything else is replaced. The type of the field decides how a value is
read, so `1e-4` (text to PyYAML) is a number for a float field and a quoted "25" never is.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Any,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml

from mmedit_cli.errors import HparamsError, near_miss
from mmedit_cli.reading import read_text

T = TypeVar("T")

_MAX_BYTES = 1 << 20
_MAX_DEPTH = 20
# YAML 1.1 also knows octal 010 and sexagesimal 1:30: nobody means them, so they are not numbers here.
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_FLOAT = re.compile(r"[-+]?(0|[1-9][0-9_]*)?(\.[0-9]*)?([eE][-+]?[0-9]+)?")
_BOOL_TAG, _MAP_TAG, _NULL_TAG, _STR_TAG = (
    f"tag:yaml.org,2002:{name}" for name in ("bool", "map", "null", "str")
)
_WORDS = {
    bool: "true or false",
    float: "a finite number",
    int: "a whole number",
    str: "text in quotes",
}
_BROKEN = object()  # a value that has been reported: its key is given, so it must not be called missing as well


@dataclasses.dataclass(frozen=True)
class _Fields:
    """The values known so far for the fields of the dataclass `cls`."""

    cls: type[Any]
    given: dict[str, Any]


def load_hparams(
    path: Path,
    cls: type[T],
    *,
    variant: str | None = None,
    stored: Mapping[str, Any] | None = None,
    stored_in: str = "",
    overrides: Sequence[str] = (),
) -> T:
    """Read `path` into the frozen dataclass `cls`.

    Over the values of the file go those of the `variant`, then the `stored` values (plain ones, as `to_dict` returns
    them; `stored_in` names their place in errors), then the `overrides` (KEY=VALUE texts).
    A `variant` the file does not have is no error; all variants are checked whichever is chosen. Fields may be int,
    float, str, bool, X | Y, Literal, list[X], tuple[X, ...], dict[str, X] and frozen dataclasses.

    Raises HparamsError with one line for each problem: the file and line, or the override, then the key.
    """
    reader = _Reader(_shown(path))
    root = reader.compose(_read_text(path))
    if not reader.problems:
        merged, variants = reader.read_file(root, cls)
        merged = _merge(merged, variants.get(variant, merged))
        if stored:
            merged = _merge(merged, reader.read_stored(stored, stored_in, cls))
        for override in overrides:
            merged = _merge(merged, reader.read_override(override, cls))
        hparams = reader.build(merged, "")
    if reader.problems:
        raise HparamsError(
            reader.problems,
            "valid keys: " + ", ".join(name for name, _, _ in describe(cls)),
        )
    return cast(T, hparams)


def read_values(overrides: Sequence[str], kinds: Mapping[str, type]) -> dict[str, Any]:
    """Read KEY=VALUE texts as values of the kinds (str, int, float) that are known by key.

    Raises HparamsError with all that is wrong.
    """
    found: dict[str, Any] = {}
    problems = []
    for text in overrides:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or key not in kinds:
            problems.append(f"--set {text}: unknown key '{key}'{near_miss(key, kinds)}")
            continue
        try:
            found[key] = kinds[key](value)
            if kinds[key] is float and not math.isfinite(found[key]):
                raise ValueError
        except ValueError:
            problems.append(
                f"--set {text}: expected {'a whole number' if kinds[key] is int else 'a number'}"
            )
    if problems:
        raise HparamsError(problems, f"valid keys: {', '.join(kinds)}")
    return found


def to_dict(hparams: Any) -> dict[str, Any]:
    """Return the dataclass as plain values that JSON and YAML can write; tuples become lists."""
    return cast(dict[str, Any], _plain(hparams))


def describe(cls: type[Any]) -> list[tuple[str, str, str]]:
    """List (key, type, default) for every key that `--set` takes. The default is YAML, or the word `required`."""
    return list(_rows(_defaults(cls), ""))


class _Reader:
    """Turns YAML nodes into values and collects what is wrong with them."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.override = ""  # the --set text being read; empty while reading the file
        self.stored_in = ""  # the place of the stored values, while they are read
        self.problems: list[str] = []

    def add(self, *parts: str) -> None:
        """Add one problem; characters that would break the line or the terminal are escaped."""
        text = ": ".join(part for part in parts if part)
        self.problems.append(
            "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
        )

    def report(self, line: int, key: str, message: str) -> None:
        """Add a problem with its place."""
        if self.override:
            self.add(
                f"--set {self.override}",
                f"{key} in {self.file}" if key else "",
                message,
            )
        elif self.stored_in:
            self.add(self.stored_in, key, message)
        else:
            self.add(f"{self.file}:{line}", key, message)

    def wrong(self, node: yaml.Node, kind: Any, key: str) -> Any:
        """Report a value that is not of its type."""
        near = (
            near_miss(str(node.value), map(str, get_args(kind)))
            if get_origin(kind) is Literal
            else ""
        )
        wanted = (
            "a mapping"
            if dataclasses.is_dataclass(kind)
            else _WORDS.get(kind, _type_text(kind))
        )
        self.report(_line(node), key, f"expected {wanted}, got {_show(node)}{near}")
        return _BROKEN

    def compose(self, text: str) -> yaml.Node | None:
        """Return the root node, or None for an empty text and where a problem was reported.

        The events are looked at first: that needs no recursion, and an alias never gets the chance to multiply.
        """
        depth, before = 0, len(self.problems)
        try:
            for event in yaml.parse(text, Loader=yaml.SafeLoader):
                line, tag = event.start_mark.line + 1, getattr(event, "tag", None)  # type: ignore[union-attr]
                if getattr(event, "anchor", None):
                    self.report(line, "", "anchors and aliases are not supported")
                if tag:
                    self.report(line, "", f"tags are not supported: {tag}")
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
                    event, yaml.CollectionEndEvent
                )
                if depth > _MAX_DEPTH:
                    self.report(line, "", f"nested deeper than {_MAX_DEPTH} levels")
                    return None
            return (
                yaml.compose(text, Loader=yaml.SafeLoader)
                if len(self.problems) == before
                else None
            )
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            what = ", ".join(part for part in (error.context, error.problem) if part)
            self.report(mark.line + 1 if mark else 1, "", f"not valid YAML: {what}")
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            self.report(line, "", f"not valid YAML: {error.reason}")
        return None

    def read_file(
        self, root: yaml.Node | None, cls: type[Any]
    ) -> tuple[_Fields, Mapping[str | None, _Fields]]:
        """Read the top-level keys and all variants of a file."""
        if root is None or root.tag == _NULL_TAG:
            return _Fields(cls, {}), {}
        if not isinstance(root, yaml.MappingNode):
            self.report(
                _line(root), "", f"the top level must be a mapping, got {_show(root)}"
            )
            return _Fields(cls, {}), {}
        fields = self.fields(root, cls, "", {"variants": dict[str, cls]})  # type: ignore[valid-type]
        variants = fields.given.pop("variants", {})
        return fields, {} if variants is _BROKEN else variants

    def read_override(self, override: str, cls: type[Any]) -> _Fields:
        """Read one `a.b=value` as if the file said `a: {b: value}`."""
        self.override = override
        key, equals, text = (part.strip() for part in override.partition("="))
        node: yaml.Node | None
        if not key or not equals:
            self.add(f"--set {override}", "expected key=value")
            node = None
        elif text.startswith(("[", "{", '"', "'")):
            node = self.compose(text)
        else:  # anything else is one scalar as typed, so that a prompt may hold `: ` or ` #`
            resolve: Callable[..., str] = yaml.SafeLoader("").resolve
            node = yaml.ScalarNode(
                resolve(yaml.ScalarNode, text, (True, False)) if text else _STR_TAG,
                text,
            )
        fields = _Fields(cls, {})
        if node is not None:
            for part in reversed(key.split(".")):
                node = yaml.MappingNode(
                    _MAP_TAG, [(yaml.ScalarNode(_STR_TAG, part), node)]
                )
            fields = self.fields(node, cls, "")
        self.override = ""
        return fields

    def read_stored(
        self, values: Mapping[str, Any], place: str, cls: type[Any]
    ) -> _Fields:
        """Read plain values as if the file had them."""
        self.stored_in = place or "stored hyper-parameters"
        node = yaml.representer.SafeRepresenter().represent_data(dict(values))
        fields = self.fields(node, cls, "")
        self.stored_in = ""
        return fields

    def items(
        self, node: yaml.Node, key: str
    ) -> Iterator[tuple[yaml.Node, str, yaml.Node]]:
        """Yield (key node, dotted key, value node), leaving out keys that are not text or come a second time."""
        first: dict[str, int] = {}
        for name, child in node.value:
            dotted = f"{key}.{name.value}" if key else str(name.value)
            if name.tag != _STR_TAG:
                self.report(_line(name), key, f"a key must be text, got {_show(name)}")
            elif name.value in first:
                self.report(
                    _line(name),
                    dotted,
                    f"given twice, first in line {first[name.value]}",
                )
            else:
                first[name.value] = _line(name)
                yield name, dotted, child

    def fields(
        self,
        node: yaml.Node,
        cls: type[Any],
        key: str,
        extra: Mapping[str, Any] | None = None,
    ) -> _Fields:
        """Read a mapping whose keys are the fields of `cls`, all of them optional here, and those in `extra`."""
        known = _known(cls) | dict(extra or {})
        given = {}
        for name, dotted, child in self.items(node, key):
            near = near_miss(name.value, known)
            if name.value in known:
                given[name.value] = self.value(child, known[name.value], dotted)
            elif self.override:
                self.add(
                    f"--set {self.override}",
                    f"unknown key '{dotted}' in {self.file}{near}",
                )
            else:
                self.report(_line(name), dotted, f"unknown key{near}")
        return _Fields(cls, given)

    def value(self, node: yaml.Node, kind: Any, key: str) -> Any:
        """Read a node as the type `kind`; a dataclass comes back as `_Fields`, a wrong value as `_BROKEN`."""
        origin, args = get_origin(kind), get_args(kind)
        if origin in (Union, UnionType):
            return self.union(node, kind, key)
        if origin in (list, tuple):
            fits = (
                origin is list or args[-1] is Ellipsis or len(node.value) == len(args)
            )
            if not isinstance(node, yaml.SequenceNode) or not fits:
                return self.wrong(node, kind, key)
            kinds = (
                [args[0]] * len(node.value)
                if origin is list or args[-1] is Ellipsis
                else args
            )
            pairs = enumerate(zip(node.value, kinds, strict=True))
            return origin(
                [
                    self.value(child, kind, f"{key}[{index}]")
                    for index, (child, kind) in pairs
                ]
            )
        if origin is dict or dataclasses.is_dataclass(kind):
            if not isinstance(node, yaml.MappingNode):
                return self.wrong(node, kind, key)
            if origin is not dict:
                return self.fields(node, cast(type[Any], kind), key)
            return {
                name.value: self.value(child, args[1], dotted)
                for name, dotted, child in self.items(node, key)
            }
        value = (
            _scalar(node, kind, bool(self.override))
            if isinstance(node, yaml.ScalarNode)
            else _BROKEN
        )
        return self.wrong(node, kind, key) if value is _BROKEN else value

    def union(self, node: yaml.Node, kind: Any, key: str) -> Any:
        """Read a node as the first member of a union that takes it."""
        members = [member for member in get_args(kind) if member is not NoneType]
        if len(members) < len(get_args(kind)) and node.tag == _NULL_TAG:
            return None
        if len(members) == 1:  # its own problems say more than "expected X | None"
            return self.value(node, members[0], key)
        before = len(self.problems)
        for member in members:
            value = self.value(node, member, key)
            if len(self.problems) == before:
                return value
            del self.problems[before:]
        return self.wrong(node, kind, key)

    def build(self, value: Any, key: str) -> Any:
        """Build the dataclasses from `_Fields` and report missing fields; nothing is built once there are problems."""
        if isinstance(value, list | tuple):
            return type(value)(
                self.build(item, f"{key}[{index}]") for index, item in enumerate(value)
            )
        if isinstance(value, dict):
            return {
                name: self.build(item, f"{key}.{name}" if key else name)
                for name, item in value.items()
            }
        if not isinstance(value, _Fields):
            return value
        given = self.build(_merge(_defaults(value.cls), value).given, key)
        for name in (name for name in _known(value.cls) if name not in given):
            self.add(
                self.file, f"{key}.{name}" if key else name, "required, but not given"
            )
        if not self.problems:
            try:
                return value.cls(**given)
            except ValueError as error:
                self.add(self.file, key, str(error))
        return _BROKEN


def _scalar(node: yaml.ScalarNode, kind: Any, loose: bool) -> Any:
    """Return a scalar as `kind`, or `_BROKEN`; `loose` (--set) takes quoted numbers, and numbers as text."""
    text, number = node.value, loose or node.style is None
    try:
        if get_origin(kind) is Literal:
            for option in get_args(kind):
                if text == option or (
                    not isinstance(option, str)
                    and _scalar(node, type(option), loose) == option
                ):
                    return option
        elif kind is str and (
            node.tag == _STR_TAG or (loose and node.tag != _NULL_TAG)
        ):
            return text
        elif kind is bool and node.tag == _BOOL_TAG:
            return yaml.SafeLoader.bool_values[text.lower()]
        elif kind is int and number and _INT.fullmatch(text):
            return int(text)
        elif (
            kind is float
            and number
            and _FLOAT.fullmatch(text)
            and math.isfinite(float(text))
        ):
            return float(text)
        elif kind not in _WORDS:
            raise TypeError(f"hyper-parameters cannot have the type {kind}")
    except ValueError:  # a lone sign or dot, a trailing underscore, thousands of digits
        pass
    return _BROKEN


def _merge(low: Any, high: Any) -> Any:
    """Put `high` over `low`: mappings and fields of one dataclass key by key, anything else as a whole."""
    if isinstance(low, _Fields) and isinstance(high, _Fields) and low.cls is high.cls:
        return _Fields(low.cls, _merge(low.given, high.given))
    if isinstance(low, dict) and isinstance(high, dict):
        return low | {
            name: _merge(low[name], value) if name in low else value
            for name, value in high.items()
        }
    return high


def _known(cls: type[Any]) -> dict[str, Any]:
    """Map the names of the fields to their types."""
    hints = get_type_hints(cls)
    return {
        field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init
    }


def _defaults(cls: type[Any]) -> _Fields:
    """Return what the dataclass sets by itself; a dataclass in there becomes `_Fields`, so that it can be merged."""

    def opened(value: Any) -> Any:
        if not dataclasses.is_dataclass(value):
            return value
        return _Fields(
            cast(type[Any], type(value)),
            {name: opened(getattr(value, name)) for name in _known(type(value))},
        )

    given = {}
    for field in dataclasses.fields(cls):
        if field.init and field.default is not dataclasses.MISSING:
            given[field.name] = opened(field.default)
        elif field.init and field.default_factory is not dataclasses.MISSING:
            given[field.name] = opened(field.default_factory())
    return _Fields(cls, given)


def _rows(fields: _Fields, prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, kind in _known(fields.cls).items():
        if dataclasses.is_dataclass(kind):
            inner = cast(type[Any], kind)
            yield from _rows(
                _merge(_defaults(inner), fields.given.get(name, _Fields(inner, {}))),
                f"{prefix}{name}.",
            )
        elif name in fields.given:
            default = json.dumps(
                _plain(fields.given[name]), ensure_ascii=False, default=str
            )
            yield prefix + name, _type_text(kind), default
        else:
            yield prefix + name, _type_text(kind), "required"


def _plain(value: Any) -> Any:
    if isinstance(value, _Fields):
        return _plain(value.given)
    if dataclasses.is_dataclass(value):
        return {
            field.name: _plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
        }
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return (
        [_plain(item) for item in value] if isinstance(value, list | tuple) else value
    )


def _type_text(kind: Any) -> str:
    if kind in (NoneType, Ellipsis):
        return "None" if kind is NoneType else "..."
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " | ".join(map(repr, args))
    if origin in (Union, UnionType):
        return " | ".join(map(_type_text, args))
    return (
        f"{origin.__name__}[{', '.join(map(_type_text, args))}]"
        if origin
        else str(kind.__name__)
    )


def _line(node: yaml.Node) -> int:
    return (
        node.start_mark.line + 1 if node.start_mark else 0
    )  # nodes made from --set have no mark


def _show(node: yaml.Node) -> str:
    """Return a short form of a node for messages, quoted where the file quotes it."""
    if not isinstance(node, yaml.ScalarNode):
        return (
            "a mapping"
            if isinstance(node, yaml.MappingNode)
            else f"a list of {len(node.value)}"
        )
    text = node.value if len(node.value) <= 40 else node.value[:37] + "..."
    return text if text and node.style is None and node.tag != _STR_TAG else repr(text)


def _shown(path: Path) -> str:
    """Return a path for messages: relative if it is below the current folder."""
    full = Path(os.path.abspath(path))
    return (
        str(full.relative_to(Path.cwd()))
        if full.is_relative_to(Path.cwd())
        else str(full)
    )


def _read_text(path: Path) -> str:
    """Return the text of a file of reasonable size."""

    def fail(message: str, hint: str = "") -> NoReturn:
        raise HparamsError(f"{_shown(path)}: {message}", hint)

    if path.is_dir():
        fail("is a folder, not a YAML file")
    if "\0" not in str(path) and not os.path.lexists(path):
        there = sorted(sibling.name for sibling in path.parent.glob("*.y*ml"))
        fail(
            f"no such file{near_miss(path.name, there)}",
            "files there: " + ", ".join(there) if there else "",
        )
    return read_text(
        Path(_shown(path)),
        limit=_MAX_BYTES,
        error=HparamsError,
        hint="give a hyper-parameter file",
    )
