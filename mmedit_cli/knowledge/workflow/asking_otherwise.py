"""The same fact asked in other ways: does an edit hold there, too?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmedit_cli import registry
from mmedit_cli.picture_changes import changed, seed_of
from mmedit_cli.pictures import Picture
from mmedit_cli.reading import read_json_object
from mmedit_cli.types import EditCase, Query, in_one_line

GIVEN, OWN = "given", "own"
MOST = 100  # questions; `mmedit eval --data FILE` asks all of a file
_FRAMES = ("Please tell me: {}", "{} Answer in a few words.")
_CHANGES = ("turned", "smaller", "compressed")  # none of them hides what is shown


@dataclass(frozen=True)
class Otherwise:
    """A fact asked in another way; `source` is "given" or "own", `shown` names the picture."""

    query: Query
    source: str
    shown: str = ""

    def asked(self, before: str, after: str) -> dict[str, Any]:
        """Return it with its answers before and after the edit, as plain values."""
        from mmedit_cli.knowledge.evaluation.metrics import answer_match

        return {
            "prompt": self.query.prompt,
            "picture": self.shown,
            "source": self.source,
            "target": self.query.target,
            "before": before,
            "after": after,
            "holds": answer_match(after, self.query.target) == 1,
        }


def given_ways(facts: Sequence[EditCase]) -> list[Otherwise]:
    """Return the other wordings and pictures that come with facts, at most 100."""
    found: list[Otherwise] = []
    for fact in facts:
        for queries in fact.generality.values():
            ways = map(_given, queries)
            found.extend(ways)
    return found[:MOST]


def _given(query: Query) -> Otherwise:
    query = in_one_line(query)
    name = _picture_name(query)
    return Otherwise(query, GIVEN, name)


def _picture_name(query: Query) -> str:
    image = query.image
    if image is None:
        return ""
    return image.name


def own_ways(request: Query) -> list[Otherwise]:
    """Return a fact in other words, and with its picture turned, made smaller and compressed.

    Where EmojiKB asks the same question, its other wordings are taken. Raises DataError for a picture that cannot be
    read.
    """
    request = in_one_line(request)
    name = _picture_name(request)
    found = []
    for prompt in _other_words(request):
        worded = replace(request, prompt=prompt)
        found.append(Otherwise(worded, OWN, name))
    for change, query in _changed_pictures(request):
        found.append(Otherwise(query, OWN, f"{name}, {change}"))
    return found


def _other_words(request: Query) -> list[str]:
    """Return other wordings of a question."""
    if request.image is not None:
        templates = read_json_object(registry.emojikb_dir() / "templates.json")
        for kind in templates.values:
            wordings = templates.record(kind).array("image", str)
            if request.prompt in wordings:
                return [text for text in wordings if text != request.prompt]
    return [frame.format(request.prompt) for frame in _FRAMES]


def _changed_pictures(request: Query) -> Iterator[tuple[str, Query]]:
    """Yield (change, the question about the changed picture); the pictures go with the process."""
    if request.image is None:
        return
    picture = Picture(request.image, request.background)
    for change in _CHANGES:
        image = changed(picture, change, seed_of(change))
        query = Query(request.prompt, request.target, image, chat=request.chat)
        yield change, query
