"""Whether an edit of a picture was made: a model, or a classifier of artists, is asked about it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from PIL import Image

from mmedit_cli.knowledge.evaluation.metrics import answer_match
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.picture_editing.data.base import EditPair
from mmedit_cli.picture_editing.data.emojikb_edits import WHO
from mmedit_cli.picture_editing.evaluation.artists import ArtistClassifier
from mmedit_cli.storage import temporary_folder
from mmedit_cli.types import Query

_LONGEST = 16  # tokens of an answer


class Judge:
    """Says which pictures are what a pair wants; scores that it gives carry the name of the model it asks."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self.model, self.name = model, model.name
        self._legible: dict[
            tuple[str, str], bool
        ] = {}  # pairs whose goal was asked about, by uid and digest

    @cached_property
    def _artists(self) -> ArtistClassifier:
        return ArtistClassifier.load()

    def reached(
        self, pictures: Sequence[Image.Image], pairs: Sequence[EditPair]
    ) -> list[float | None]:
        """Return 100 or 0 for each picture and its pair, None where nothing is asked or the goal is not read right.

        A question must be answered as the pair says, by the words its answer begins with. Pictures have one size.
        """
        asked = [i for i, pair in enumerate(pairs) if pair.question]
        fresh = [
            pairs[i]
            for i in asked
            if (pairs[i].uid, pairs[i].digest) not in self._legible
        ]
        shown = [*(pictures[i] for i in asked), *(pair.target() for pair in fresh)]
        right = self._right(
            shown,
            [
                (pair.question, pair.answer)
                for pair in (*(pairs[i] for i in asked), *fresh)
            ],
        )
        self._legible.update(
            zip(
                ((pair.uid, pair.digest) for pair in fresh),
                right[len(asked) :],
                strict=True,
            )
        )
        found: list[float | None] = [None] * len(pairs)
        for i, made in zip(asked, right, strict=False):
            found[i] = (
                100.0 * made if self._legible[pairs[i].uid, pairs[i].digest] else None
            )
        return found

    def _right(
        self, pictures: Sequence[Image.Image], questions: Sequence[tuple[str, str]]
    ) -> list[bool]:
        """Return whether each question is answered right about its picture."""
        who = [i for i, (question, _) in enumerate(questions) if question == WHO]
        others = [i for i, (question, _) in enumerate(questions) if question != WHO]
        said = (
            dict(zip(who, self._artists.tell([pictures[i] for i in who]), strict=True))
            if who
            else {}
        )
        texts = (
            self._read([pictures[i] for i in others], [questions[i][0] for i in others])
            if others
            else []
        )
        said |= zip(others, texts, strict=True)
        return [
            answer_match(said[i], answer) == 1
            for i, (_, answer) in enumerate(questions)
        ]

    def _read(
        self, pictures: Sequence[Image.Image], questions: Sequence[str]
    ) -> list[str]:
        """Return what the model answers, generated freely."""
        with temporary_folder() as folder:
            files = [folder / f"{i}.png" for i in range(len(pictures))]
            for picture, file in zip(pictures, files, strict=True):
                picture.save(file)
            queries = [
                Query(question, image=file)
                for question, file in zip(questions, files, strict=True)
            ]
            return self.model.generate(queries, max_new_tokens=_LONGEST)
