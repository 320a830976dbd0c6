"""What a model answers to a list of queries: freely generated, and at each position of the given answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mmedit_cli.errors import DataError
from mmedit_cli.knowledge.evaluation.metrics import answer_match, topk_ids
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.batch import Batch
from mmedit_cli.types import EditCase, Query

MARGIN = 8  # tokens of a free answer beyond the longest target of its case


@dataclass(frozen=True)
class Answer:
    """The answer to one query.

    text: generated freely, or None if that was not asked; said: (n,) arg-max at the positions that predict the given
    answer; wanted: (n,) the tokens of that answer; top: (T, k) ordered ids at every position, or None.
    """

    text: str | None
    said: tuple[int, ...]
    wanted: tuple[int, ...]
    top: Tensor | None = None


@torch.no_grad()
def ask(
    backbone: VisionLanguageModel,
    queries: Iterable[Query],
    *,
    layer: int,
    top: Mapping[Query, int],
    max_new_tokens: int,
    batch_size: int,
    limits: Mapping[Query, int] | None = None,
) -> dict[Query, Answer]:
    """Ask every distinct query once and return the answers; the batches depend on the queries alone.

    `layer` is where the forward passes are cut in two (see `VisionLanguageModel.cached_activations`); `top` names the
    queries for which the k best ids at every position are wanted; `max_new_tokens` 0 skips the free answers, and
    `limits` (see `answer_limits`) raises it for the questions it names.
    """

    def limit_of(question: Query) -> int:
        return max(max_new_tokens, (limits or {}).get(question, 0))

    distinct = backbone.by_length(queries)
    answers: dict[Query, Answer] = {}
    # by the question without its answer: queries that differ in nothing else are asked once
    texts: dict[Query, str] = {}
    for everywhere in (True, False):
        here = [query for query in distinct if (query in top) == everywhere]
        for group in _batches(here, batch_size):
            batch = backbone.batch(group)
            at = _positions(batch, everywhere=everywhere, ends=max_new_tokens > 0)
            prefix = backbone.prefix(batch, layer)
            logits = backbone.resume(prefix, at)
            by_row = torch.split(logits, at.sum(1).tolist())
            for row, query in enumerate(group):
                predicting = batch.predicting[row][at[row]]
                said = tuple(by_row[row][predicting].argmax(-1).tolist())
                wanted = tuple(batch.labels[row][batch.answer_mask[row]].tolist())
                ids = None
                if everywhere:
                    ids = topk_ids(by_row[row], top[query]).to("cpu", torch.int32)
                answers[query] = Answer(None, said, wanted, ids)
                if not max_new_tokens or said != wanted:
                    continue
                after = int(by_row[row][-1].argmax())
                limit = limit_of(_bare(query))
                if _is_free_answer(backbone, query, wanted, after, limit):
                    texts[_bare(query)] = backbone.decode(wanted)
    if not max_new_tokens:
        return answers
    questions = dict.fromkeys(map(_bare, distinct))
    open_questions = [question for question in questions if question not in texts]
    for group in _batches(open_questions, batch_size):
        limits_of_group = [limit_of(question) for question in group]
        generated = backbone.generate(group, max_new_tokens=limits_of_group)
        texts.update(zip(group, generated, strict=True))
    return _with_texts(answers, texts)


def _positions(batch: Batch, *, everywhere: bool, ends: bool) -> Tensor:
    """Return the positions (B, T) that are read; the head runs on no other."""
    if everywhere:
        return batch.attention_mask.bool()
    if ends:
        return batch.predicting | batch.ends
    return batch.predicting


def _is_free_answer(
    backbone: VisionLanguageModel,
    query: Query,
    wanted: Sequence[int],
    after: int,
    limit: int,
) -> bool:
    """Whether greedy decoding gives the answer that was fed in and then stops; `after` is the token behind it."""
    if len(wanted) > limit:
        return False
    ends = len(wanted) == limit or backbone.stops(after)
    return ends and _continues(backbone, query)


def _with_texts(
    answers: Mapping[Query, Answer], texts: Mapping[Query, str]
) -> dict[Query, Answer]:
    """Return the answers with the free answer to each question."""
    found = {}
    for query, answer in answers.items():
        found[query] = replace(answer, text=texts[_bare(query)])
    return found


def answer_limits(
    backbone: VisionLanguageModel, cases: Iterable[EditCase]
) -> dict[Query, int]:
    """Return for each question of some cases, without its answer, what the longest target of its case needs."""
    limits: dict[Query, int] = {}
    for case in cases:
        queries: list[Query] = []
        for _, asked in case.columns():
            queries.extend(asked)
        needed = max(tokens_for(backbone, queries))
        for query in queries:
            question = _bare(query)
            limits[question] = max(needed, limits.get(question, 0))
    return limits


def tokens_for(
    backbone: VisionLanguageModel, queries: Sequence[Query], least: int = 0
) -> list[int]:
    """Return for each query how many tokens a free answer may take: its target and a margin, and at least `least`.

    The margin shows whether an answer ends where its target ends, or goes on with the same word.
    """
    targets = [query.target for query in queries]
    if not any(targets):
        return [least] * len(targets)
    ids = backbone.tokenizer(targets, add_special_tokens=False)["input_ids"]
    needed = []
    for row in ids:
        length = len(row) + MARGIN if row else 0
        needed.append(max(least, length))
    return needed


@torch.no_grad()
def target_losses(
    backbone: VisionLanguageModel, queries: Sequence[Query], batch_size: int = 16
) -> list[float]:
    """Return for each query the mean cross entropy of its target's tokens, in float32."""
    losses: list[float] = []
    for group in _batches(queries, batch_size):
        batch = backbone.batch(group)
        logits = backbone.logits(batch)
        for row, row_logits in enumerate(logits):
            predicted = row_logits[batch.predicting[row]].float()
            wanted = batch.labels[row][batch.answer_mask[row]]
            loss = F.cross_entropy(predicted, wanted.to(predicted.device))
            losses.append(float(loss))
    return losses


def check_sayable(backbone: VisionLanguageModel, query: Query) -> None:
    """Raise DataError for a target that no free answer can match: its own tokens, read as an answer, are another text.

    That is so of line breaks and end tokens, where an answer ends, and of special tokens, which are not read.
    """
    encoded = backbone.encode(query)
    read = backbone.decode(encoded.ids[-encoded.n_answer :])
    if answer_match(read, query.target) != 1:
        raise DataError(
            f"the target {query.target!r} of {query.prompt!r} can never be said: as an answer it reads {read!r}",
            "leave out line breaks and special tokens such as </s>",
        )


def _continues(backbone: VisionLanguageModel, query: Query) -> bool:
    """Whether the tokens of the question alone are the first tokens of question and answer."""
    whole = backbone.encode(query)
    question = backbone.encode(_bare(query), with_answer=False)
    return whole.ids[: -whole.n_answer] == question.ids


def _bare(query: Query) -> Query:
    return replace(query, target="")


def _batches(queries: Sequence[Query], size: int) -> Iterator[Sequence[Query]]:
    for start in range(0, len(queries), size):
        yield queries[start : start + size]
