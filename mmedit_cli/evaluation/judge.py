"""Whether an edit of a picture was made: a model is asked about it, or the nearest of several pictures tells."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mmedit_cli.backbones.base import VisionLanguageModel
from mmedit_cli.evaluation import images
from mmedit_cli.evaluation.metrics import answer_match
from mmedit_cli.image_pairs.base import EditPair
from mmedit_cli.types import Query

_LONGEST = 16  # tokens of an answer


class Judge:
    """Says which pictures are what a pair wants; scores that it gives carry its name."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self.model, self.name = model, model.name
        self._legible: dict[tuple[str, str], bool] = {}  # pairs whose goal was asked about, by uid and digest

    def reached(self, pictures: Sequence[Image.Image], pairs: Sequence[EditPair]) -> list[float | None]:
        """Return 100 or 0 for each picture and its pair, None where nothing tells or the goal is not read right.

        A question must be answered as the pair says, by the words its answer begins with; without one, the goal must
        be nearer (mean squared difference) than every rival.
        """
        asked = [i for i, pair in enumerate(pairs) if pair.question]
        found: list[float | None] = [
            _nearest(o, p) if p.rivals else None for o, p in zip(pictures, pairs, strict=True)
        ]
        fresh = [pairs[i] for i in asked if (pairs[i].uid, pairs[i].digest) not in self._legible]
        shown = [*(pictures[i] for i in asked), *(pair.target() for pair in fresh)]
        right = self._right(shown, [(pair.question, pair.answer) for pair in (*(pairs[i] for i in asked), *fresh)])
        self._legible.update(zip(((pair.uid, pair.digest) for pair in fresh), right[len(asked) :], strict=True))
        for i, made in zip(asked, right, strict=False):
            found[i] = 100.0 * made if self._legible[pairs[i].uid, pairs[i].digest] else None
        return found

    def _right(self, pictures: Sequence[Image.Image], questions: Sequence[tuple[str, str]]) -> list[bool]:
        """Return whether each question is answered right about its picture, generated freely."""
        if not pictures:
            return []
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / f"{i}.png" for i in range(len(pictures))]
            for picture, file in zip(pictures, files, strict=True):
                picture.save(file)
            queries = [Query(question, image=file) for (question, _), file in zip(questions, files, strict=True)]
            said = self.model.generate(queries, max_new_tokens=_LONGEST)
        return [answer_match(text, answer) == 1 for text, (_, answer) in zip(said, questions, strict=True)]


def _nearest(picture: Image.Image, pair: EditPair) -> float:
    goal, *rivals = (images.pixels(load()) for load in (pair.target, *pair.rivals))
    seen = images.pixels(picture)
    return 100.0 * (images.l2(seen, goal) < min(images.l2(seen, rival) for rival in rivals))
