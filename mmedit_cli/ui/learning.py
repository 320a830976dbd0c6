"""What visitors teach the text-to-image model: things of their own, each visitor into a folder of theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from mmedit_cli import registry
from mmedit_cli.drawing.workflow.concepts import (
    ConceptFolder,
    LearnOptions,
    learn_concept,
)
from mmedit_cli.errors import UserError
from mmedit_cli.output import Output, Tick
from mmedit_cli.runtime import LoadOptions
from mmedit_cli.types import Concept

MOST_PICTURES = 12
MOST_TRAINING = 2000  # steps
_LONGEST = 64  # characters of a name
Tell = Callable[[float, str], None]


class Learning:
    """Learns concepts for a model. `stop` ends what is being learned, so that the server can end."""

    def __init__(self, model: str, load: LoadOptions) -> None:
        self.model = model
        self.load = load
        self._stopped = Event()

    def learn(
        self,
        concept: Concept,
        method: str,
        steps: int,
        folder: Path,
        tell: Tell,
    ) -> dict[str, Any]:
        """Learn a concept into a folder, in place of one of the same name, and return its entry.

        `tell` hears the share that is done, and of what. Raises UserError for numbers out of range, else as
        `learn_concept`.
        """
        if not 1 <= steps <= MOST_TRAINING:
            raise UserError(f"steps: {steps} is not from 1 to {MOST_TRAINING:,}")
        if len(concept.images) > MOST_PICTURES:
            raise UserError(f"more than {MOST_PICTURES} pictures", "3 to 6 are usual")
        options = LearnOptions(
            editor=method,
            model=self.model,
            concept=concept,
            folder=folder,
            overrides=(f"steps={steps}",),
            force=True,
            device=self.load.device,
            dtype=self.load.dtype,
        )
        out = _Told(tell, self._stopped)
        return learn_concept(options, out)

    def stop(self) -> None:
        """End what is being learned."""
        self._stopped.set()


class _Told(Output):
    """Tells how far something is instead of printing it; raises UserError once it is to stop."""

    def __init__(self, tell: Tell, stopped: Event) -> None:
        super().__init__(quiet=True)
        self._tell = tell
        self._stopped = stopped

    @contextmanager
    def progress(self, totals: Mapping[str, int]) -> Iterator[Tick]:
        """Yield `tick(what, n)`."""
        done = dict.fromkeys(totals, 0)

        def tick(what: str, n: int) -> None:
            if self._stopped.is_set():
                raise UserError("the server has ended")
            done[what] += n
            share = done[what] / max(1, totals[what])
            self._tell(share, what)

        yield tick


def concept_of(pictures: Sequence[str], token: str, superclass: str) -> Concept:
    """Return what a visitor wants to be learned; a name without angle brackets gets them.

    Raises UserError where something is missing. The pictures are checked when they are learned from.
    """
    name = token.strip()
    word = superclass.strip()
    if not pictures:
        raise UserError("no pictures: choose three to six of one thing")
    if not name or not word:
        raise UserError("say how it is to be named, and the plain word for what it is")
    if max(len(name), len(word)) > _LONGEST:
        raise UserError(f"a name is longer than {_LONGEST} characters")
    if not name.startswith("<"):
        name = f"<{name}>"
    files = tuple(map(Path, pictures))
    return Concept(name, word, files)


def tokens_in(folder: str) -> list[str]:
    """Return the names that were learned into a visitor's folder, which need not be there yet."""
    if not folder:
        return []
    return ConceptFolder(Path(folder)).tokens


def methods() -> list[str]:
    """Return the methods that learn a thing from pictures, the one that a first try takes before the others."""
    names = list(registry.personalizers.names())
    first = "multi-melo-diffusion"
    names.remove(first)
    return [first, *names]
