"""Questions to a model, with the edits of a ledger on it or not: `mmedit ask`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedit_cli.catalog import find_model
from mmedit_cli.errors import DataError, UserError
from mmedit_cli.knowledge.evaluation.answers import tokens_for
from mmedit_cli.knowledge.ledger.edited_model import LedgerModel, open_edits
from mmedit_cli.knowledge.loading import ModelOptions, load_model
from mmedit_cli.knowledge.models.shared.generation import SAMPLINGS, described
from mmedit_cli.knowledge.workflow.editing import read_facts
from mmedit_cli.knowledge.workflow.streaming import BatchStreamer, RowStream
from mmedit_cli.output import Output
from mmedit_cli.reading import read_lines
from mmedit_cli.types import Query

_BATCH = 32
# of a file: all are in memory, and more would take days to answer
_MOST_QUESTIONS = 100_000


@dataclass(frozen=True)
class Spoken:
    """An answer, how many tokens were generated for it, and why it ended: "stop", or "length" if it was cut."""

    text: str
    tokens: int
    finish: str


class Asker:
    """A model that answers questions, with the edits of a ledger on it if `edits` names one; a context manager.

    With `compare` the base model is asked too, and which edits took part in an answer is told.
    """

    def __init__(
        self,
        model: ModelOptions,
        edits: Path | None,
        out: Output,
        *,
        compare: bool = False,
        max_new_tokens: int = 32,
        sampling: str = "greedy",
    ) -> None:
        if sampling not in SAMPLINGS:
            raise UserError(
                f"--sampling {sampling}: not a way to answer",
                f"use {' or '.join(SAMPLINGS)}",
            )
        self.compare = compare
        self.sampling = sampling
        self._stack = ExitStack()
        self.edited: LedgerModel | None = None
        if edits is not None:
            opened = open_edits(edits, model=model, out=out)
            self.edited = self._stack.enter_context(opened)
            self.backbone = self.edited.backbone
        elif compare:
            raise UserError("--compare: there is nothing to compare without --edits")
        else:
            ref = find_model(model.named, revision=model.revision)
            self.backbone = load_model(model, ref, out)
        taught: list[Query] = []
        if self.edited is not None:
            taught = [edit.request for edit in self.edited.ledger.active]
        # an answer must have room for every target that was taught
        self.least = max([max_new_tokens, *tokens_for(self.backbone, taught)])
        own = self.backbone.own_settings
        if own and sampling == "greedy":
            out.note(
                f"answers are greedy: {described(own)} of the model is ignored (--sampling model follows it)"
            )

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def answers(self, queries: Sequence[Query]) -> list[dict[str, Any]]:
        """Return the questions with their answers."""
        said = self._generate(queries)
        rows: list[dict[str, Any]] = []
        for query, answer in zip(queries, said, strict=True):
            image = query.image and str(query.image)
            rows.append({"prompt": query.prompt, "image": image, "answer": answer})
        if self.compare and self.edited is not None:
            explained = self.edited.explain(queries)
            with self.edited.paused():
                base = self._generate(queries)
            for i, row in enumerate(rows):
                row["base"] = base[i]
                row["fired"] = None if explained is None else _fired(explained[i])
        return rows

    @property
    def streams(self) -> bool:
        """Whether an answer is known word by word: beams and comparisons are known at the end."""
        return not self.compare and self.sampling != "model"

    def stream(self, query: Query, write: Callable[[str], None]) -> None:
        """Answer one question; `write` gets the words as they are generated."""
        self.stream_together([query], [write])

    def stream_together(
        self,
        queries: Sequence[Query],
        writers: Sequence[Callable[[str], None]],
        *,
        limits: Sequence[int] | None = None,
        given_up: Callable[[], bool] = lambda: False,
    ) -> list[Spoken]:
        """Answer a batch of questions greedily; the writer of each gets its words as they are generated.

        `limits` are tokens, a limit a question; without them answers are as long as those of `answers`. Raises
        Abandoned as soon as `given_up()` is true.
        """
        limits = limits or tokens_for(self.backbone, queries, self.least)
        rows = []
        for limit, write in zip(limits, writers, strict=True):
            rows.append(RowStream(self.backbone, limit, write))
        texts = self.backbone.generate(
            queries,
            max_new_tokens=limits,
            streamer=BatchStreamer(rows, given_up),
        )
        spoken = []
        for text, row in zip(texts, rows, strict=True):
            spoken.append(Spoken(text, row.tokens, row.finish))
        return spoken

    def _generate(self, queries: Sequence[Query]) -> list[str]:
        """Return the answers, as long as the targets of the questions and of the edits need."""
        said: list[str] = []
        for at in range(0, len(queries), _BATCH):
            part = queries[at : at + _BATCH]
            limits = tokens_for(self.backbone, part, self.least)
            said += self.backbone.generate(
                part, max_new_tokens=limits, sampling=self.sampling
            )
        return said


def read_questions(file: Path, image: Path | None) -> list[Query]:
    """Return the questions of a .txt file, a question a line, all about `image`; or of a file of facts or cases."""
    if file.suffix.lower() != ".txt":
        return [fact.request for fact in read_facts(file)]
    questions: list[Query] = []
    for _, line in read_lines(file, hint="a text file with a question a line"):
        if text := line.strip():
            questions.append(Query(text, image=image))
        if len(questions) > _MOST_QUESTIONS:
            raise DataError(
                f"{file}: more than {_MOST_QUESTIONS:,} questions",
                "split it into smaller files",
            )
    if not questions:
        raise DataError(f"{file}: no questions in it", "a question a line")
    return questions


def _fired(weights: dict[int, float]) -> list[dict[str, Any]]:
    return [{"edit": edit, "weight": weight} for edit, weight in weights.items()]
