"""A judge of edits: it asks a model, or the classifier of artists, a question about the edited picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

from PIL import Image

from mmedit_cli.drawing.data.emojikb_facts import WHO
from mmedit_cli.drawing.evaluation.artists import ArtistClassifier
from mmedit_cli.knowledge.evaluation.metrics import answer_match
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.picture_editing.data.base import EditPair
from mmedit_cli.storage import temporary_folder
from mmedit_cli.types import Query

_LONGEST = 16  # tokens of an answer


class Judge:
    """Decides which pictures reached the goal of their pair; `name` is that of the model it asks."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self.model = model
        self.name = model.name
        # Whether the question about the goal itself is answered right, by uid and digest of the pair.
        self._readable: dict[tuple[str, str], bool] = {}

    @cached_property
    def _artists(self) -> ArtistClassifier:
        return ArtistClassifier.load()

    def reached(
        self, pictures: Sequence[Image.Image], pairs: Sequence[EditPair]
    ) -> list[float | None]:
        """Return 100 or 0 for each picture and its pair, None if there is no question or the goal is not read right.

        A question is answered right by the words that the pair's answer begins with. Pictures have one size.
        """
        asked = []
        shown = []
        goals = []
        for i, pair in enumerate(pairs):
            if pair.question:
                asked.append(pair)
                shown.append(pictures[i])
                if _key(pair) not in self._readable:
                    goals.append(pair)
        # The goals are asked about together with the pictures, each once.
        shown += [pair.target() for pair in goals]
        right = self._answered_right(shown, [*asked, *goals])
        for pair, readable in zip(goals, right[len(asked) :], strict=True):
            self._readable[_key(pair)] = readable
        answers = iter(right)
        values: list[float | None] = []
        for pair in pairs:
            if not pair.question:
                values.append(None)
                continue
            reached = next(answers)
            readable = self._readable[_key(pair)]
            values.append(100.0 * reached if readable else None)
        return values

    def _answered_right(
        self, pictures: Sequence[Image.Image], pairs: Sequence[EditPair]
    ) -> list[bool]:
        """Return whether the question of each pair is answered right about a picture."""
        for_classifier = []
        for_model = []
        questions = []
        for picture, pair in zip(pictures, pairs, strict=True):
            if pair.question == WHO:
                for_classifier.append(picture)
            else:
                for_model.append(picture)
                questions.append(pair.question)
        artists: Iterator[str] = iter(())
        if for_classifier:
            artists = iter(self._artists.classify(for_classifier))
        texts: Iterator[str] = iter(())
        if for_model:
            texts = iter(self._ask_model(for_model, questions))
        right = []
        for pair in pairs:
            answer = next(artists if pair.question == WHO else texts)
            match = answer_match(answer, pair.answer)
            right.append(match == 1)
        return right

    def _ask_model(
        self, pictures: Sequence[Image.Image], questions: Sequence[str]
    ) -> list[str]:
        """Return the answers that the model generates."""
        with temporary_folder() as folder:
            queries = []
            for i, (picture, question) in enumerate(
                zip(pictures, questions, strict=True)
            ):
                file = folder / f"{i}.png"
                picture.save(file)
                queries.append(Query(question, image=file))
            return self.model.generate(queries, max_new_tokens=_LONGEST)


def _key(pair: EditPair) -> tuple[str, str]:
    return pair.uid, pair.digest
