"""One model, many who ask: questions that arrive while it answers wait, and are answered together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmedit_cli.errors import MmeditError
from mmedit_cli.knowledge.workflow.asking import Asker, Spoken
from mmedit_cli.knowledge.workflow.streaming import Abandoned
from mmedit_cli.output import report_failure
from mmedit_cli.serving.chat import ApiError
from mmedit_cli.types import Query

MOST_TOGETHER = 32  # questions of one batch
MOST_WAITING = 64


@dataclass(frozen=True)
class Words:
    """A part of an answer."""

    text: str


@dataclass(frozen=True)
class Done:
    """The whole answer, and the number of tokens of its question (with the picture's)."""

    spoken: Spoken
    asked: int


@dataclass(frozen=True)
class Failed:
    """There is no answer."""

    error: Exception


Event = Words | Done | Failed


@dataclass(eq=False)
class Question:
    """A question that waits for its answer. `tell` gets Words while it is generated, and in the end Done or Failed.

    `tell` is called from the thread of the model. `limit` is in tokens; None: as long as the server says. `gone` is
    set when whoever asked has left. `picture` is removed from disk at the end.
    """

    query: Query
    limit: int | None
    tell: Callable[[Event], None]
    picture: Path | None = None
    gone: bool = False
    begun: bool = False
    n_tokens: int = 0

    def write(self, text: str) -> None:
        """Pass on the next words."""
        self.begun = True
        self.tell(Words(text))

    def end(self, event: Done | Failed) -> None:
        """Pass on the last that is said about it."""
        self.drop()
        self.tell(event)

    def drop(self) -> None:
        """Remove its picture from disk."""
        if self.picture is not None:
            self.picture.unlink(missing_ok=True)


class Desk:
    """Takes questions from any thread and answers them in one of its own, the only one that touches the model.

    It is a context manager; leaving gives up what is being answered.
    """

    def __init__(self, asker: Asker) -> None:
        self.asker = asker
        self._waiting: list[Question] = []
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    def __enter__(self) -> Desk:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def put(self, question: Question) -> None:
        """Queue a question; raise ApiError if too many wait already."""
        with self._changed:
            if len(self._waiting) >= MOST_WAITING:
                question.drop()
                problem = f"{MOST_WAITING} questions wait already; ask again later"
                raise ApiError(429, problem, "rate_limit_exceeded")
            self._waiting.append(question)
            self._changed.notify()

    def _work(self) -> None:
        while not self._closed:
            for batch in self._that_fit(self._next()):
                self._answer(batch)
        for question in self._waiting:
            question.end(Failed(_stopping()))

    def _next(self) -> list[Question]:
        """Wait for questions, and return those that have come by now; none if the desk was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            taken = self._waiting[:MOST_TOGETHER]
            self._waiting = self._waiting[MOST_TOGETHER:]
        return taken

    def _that_fit(self, questions: Sequence[Question]) -> Iterator[list[Question]]:
        """Yield the questions in batches in which each has the room for its answer that it would have alone."""
        together: list[Question] = []
        longest = most = 0
        for question in questions:
            if not self._is_usable(question):
                continue
            limit = self._limit(question)
            both = max(longest, question.n_tokens) + max(most, limit)
            if together and both > self.asker.backbone.max_length:
                yield together
                together, longest, most = [], 0, 0
            together.append(question)
            longest = max(longest, question.n_tokens)
            most = max(most, limit)
        if together:
            yield together

    def _is_usable(self, question: Question) -> bool:
        """Measure a question; tell whoever asked if the model cannot read it."""
        if question.gone:
            question.end(Failed(_stopping()))
            return False
        try:
            encoded = self.asker.backbone.encode(question.query, with_answer=False)
        except Exception as error:
            question.end(Failed(_noted(error)))
            return False
        question.n_tokens = len(encoded.ids)
        return True

    def _limit(self, question: Question) -> int:
        """Return how many tokens an answer may take, at most what the model can read."""
        backbone = self.asker.backbone
        room = backbone.max_length - question.n_tokens
        wanted = question.limit or self.asker.least
        fitting = min(wanted, room)
        return max(1, fitting)

    def _answer(self, batch: Sequence[Question]) -> None:
        """Answer questions together; if that fails, those that nothing was said to yet one by one."""
        error = self._tried(batch)
        if error is None:
            return
        for question in batch:
            if question.begun or len(batch) == 1:
                question.end(Failed(error))
            else:
                self._answer([question])

    def _tried(self, batch: Sequence[Question]) -> Exception | None:
        """Answer questions in one batch; return the error that prevented it."""

        def given_up() -> bool:
            return self._closed or all(question.gone for question in batch)

        try:
            spoken = self.asker.stream_together(
                [question.query for question in batch],
                [question.write for question in batch],
                limits=[self._limit(question) for question in batch],
                given_up=given_up,
            )
        except Abandoned:
            spoken = []
        except Exception as error:
            return _noted(error)
        if not spoken:
            for question in batch:
                question.end(Failed(_stopping()))
        for question, answer in zip(batch, spoken, strict=False):
            question.end(Done(answer, question.n_tokens))
        return None


def _noted(error: Exception) -> Exception:
    """Print an unexpected failure, and return any without its frames: they hold the tensors of the batch."""
    if not isinstance(error, MmeditError):
        report_failure(error)
    return error.with_traceback(None)


def _stopping() -> ApiError:
    return ApiError(503, "the server stops", "server_stopping")
