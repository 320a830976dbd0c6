"""YAML as `reading` allows it: no anchors, aliases or tags, text keys that stand once, bounded depth and numbers."""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar, NoReturn

import yaml

_STR_TAG = "tag:yaml.org,2002:str"
_TIMESTAMP_TAG = "tag:yaml.org,2002:timestamp"
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class YamlFault(ValueError):
    """What is wrong with a YAML text, and in which line (0: not known)."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(message)
        self.line = line


class _Rules:
    """What is added to a safe loader: dates stay text, and values are checked."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP_TAG]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    longest_integer = 0

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Read a whole number that is not absurdly long."""
        digits = len(node.value)
        if digits > self.longest_integer:
            _fail(node, f"a whole number of {digits:,} digits")
        return yaml.SafeLoader.construct_yaml_int(self, node)  # type: ignore[arg-type]

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        """Read a finite number."""
        value = yaml.SafeLoader.construct_yaml_float(self, node)  # type: ignore[arg-type]
        if not math.isfinite(value):
            _fail(node, f"{node.value[:40]} is not a finite number")
        return value

    def construct_yaml_map(self, node: yaml.MappingNode) -> Any:
        """Read a mapping whose keys are texts that stand once."""
        data: dict[str, Any] = {}
        yield data
        for key, value in node.value:
            if key.tag != _STR_TAG:
                _fail(key, "a key must be text (put quotes around it)")
            if key.value in data:
                _fail(key, f"the key {key.value[:40]!r} stands twice")
            data[key.value] = self.construct_object(value, deep=True)  # type: ignore[attr-defined]


class _PurePython(_Rules, yaml.SafeLoader):
    """The loader of PyYAML, which reads every text that PyYAML writes."""


class _Fast(_Rules, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The loader of libyaml, which is ten times faster."""


for _class in (_PurePython, _Fast):
    for _kind in ("int", "float", "map"):
        _class.add_constructor(
            f"tag:yaml.org,2002:{_kind}", getattr(_class, f"construct_yaml_{_kind}")
        )


def load(text: str, deepest: int, longest_integer: int) -> Any:
    """Return the value of a YAML text; raise YamlFault for what is not allowed.

    The events are looked at first: that needs no recursion, and an alias never gets the chance to multiply.
    """
    kind: Any = (
        _PurePython if _ESCAPED_SURROGATE.search(text) else _Fast
    )  # libyaml refuses half a character
    loader: Any = None
    try:
        _check_events(text, deepest, kind)
        loader = kind(text)
        loader.longest_integer = longest_integer
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise YamlFault(
            f"not valid YAML ({what})", mark.line + 1 if mark else 0
        ) from error
    except yaml.reader.ReaderError as error:
        raise YamlFault(
            f"not valid YAML ({error.reason})", text.count("\n", 0, error.position) + 1
        ) from error
    except YamlFault:
        raise
    except ValueError as error:  # a number that only looks like one
        raise YamlFault(f"not valid YAML ({error})") from error
    finally:
        if loader is not None:
            loader.dispose()


def _check_events(text: str, deepest: int, kind: Any) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=kind):
        line = event.start_mark.line + 1  # type: ignore[union-attr]
        if getattr(event, "anchor", None):
            raise YamlFault("anchors and aliases are not supported", line)
        tag = getattr(event, "tag", None)
        if tag:
            raise YamlFault(f"tags are not supported: {tag[:40]}", line)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
            event, yaml.CollectionEndEvent
        )
        if depth > deepest:
            raise YamlFault(f"nested deeper than {deepest} levels", line)


def _fail(node: yaml.Node, message: str) -> NoReturn:
    raise YamlFault(message, node.start_mark.line + 1 if node.start_mark else 0)
