"""The nouns of the project: what is asked, what is edited, what is scored. No torch here.

Shapes throughout the code base: B batch, T tokens, D width, V vocabulary, N_v image tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmedit_cli.in_hand import as_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image


@dataclass(frozen=True)
class Query:
    """One thing to ask a vision-language model, and the answer to score or to teach.

    `image` is None for a text-only question; `target` may be empty where no answer is needed (generation only).
    `background` is the colour behind the transparent parts of the image, as #rrggbb. `chat` asks in the chat format of
    the model.

    A picture of PIL or an array of uint8, (H, W), (H, W, 3) or (H, W, 4), may be given for the image: it becomes a
    file that goes with the process. Raises DataError for what is no picture.
    """

    prompt: str
    target: str = ""
    image: Path | None = None
    background: str = "#ffffff"
    chat: bool = False

    if TYPE_CHECKING:  # what may be given is more than what is kept

        def __init__(
            self,
            prompt: str,
            target: str = "",
            image: Path | str | Image.Image | NDArray[np.uint8] | None = None,
            background: str = "#ffffff",
            chat: bool = False,
        ) -> None: ...

    def __post_init__(self) -> None:
        if self.image is not None and not isinstance(self.image, Path):
            object.__setattr__(self, "image", as_file(self.image))


def in_one_line(query: Query) -> Query:
    """Return the query with blanks for the line breaks of its target: an answer ends at its first line break."""
    if not re.search(r"[\r\n]", query.target):
        return query
    return replace(query, target=re.sub(r"\s*[\r\n]\s*", " ", query.target).strip())


Probes = Mapping[str, tuple[Query, ...]]


@dataclass(frozen=True)
class EditCase:
    """One edit and everything that is asked to judge it.

    The keys of `generality`, `locality` and `portability` become the columns of a report, so a new data set needs no
    new code in the evaluator. `needs` are, by name of a portability or generality column, questions about what the
    column builds on (the facts of a hop, the thing in another artist's picture): the untouched model is asked them,
    and the column is also reported for the cases where it answers them all.
    `type` groups cases of one sort of fact; `concept` is what the case is about, where the data say so: cases of one
    concept are not independent. `place` says where the record came from (file and line), for messages.
    """

    uid: str
    request: Query
    generality: Probes = field(default_factory=dict)
    locality: Probes = field(default_factory=dict)
    portability: Probes = field(default_factory=dict)
    needs: Probes = field(default_factory=dict)
    type: str = ""
    place: str = ""
    concept: str = ""

    def columns(self) -> Iterator[tuple[str, tuple[Query, ...]]]:
        """Yield (column, queries), the request first: `reliability`, `generality.<name>`, ..., `needs.<name>`."""
        yield "reliability", (self.request,)
        for family in ("generality", "locality", "portability", "needs"):
            for name, queries in getattr(self, family).items():
                yield f"{family}.{name}", queries


@dataclass(frozen=True)
class Concept:
    """Something of one's own to draw: pictures of it, the word for what it is, and the token that will name it.

    `token` is written in prompts, e.g. `<my-dog>`; `superclass` is a word or a few, e.g. "dog".
    """

    token: str
    superclass: str
    images: tuple[Path, ...]


@dataclass(frozen=True)
class ConceptChange:
    """What a text is to be drawn as: like one other text, or like the mean of several; without any it is erased.

    `keep` are texts that are to be drawn as before.
    """

    source: str
    targets: tuple[str, ...]
    keep: tuple[str, ...] = ()
