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
    texts: dict[
        Query, str
    ] = {}  # by the question without its answer: what differs in nothing else is asked once
    for everywhere in (True, False):
        for group in _chunks(
            [query for query in distinct if (query in top) == everywhere], batch_size
        ):
            batch = backbone.batch(group)
            # the head runs on the positions that are read, and on no other
            at = batch.predicting | batch.ends if max_new_tokens else batch.predicting
            if everywhere:
                at = batch.attention_mask.bool()
            logits = backbone.resume(backbone.prefix(batch, layer), at).split(
                at.sum(1).tolist()
            )
            for row, query in enumerate(group):
                wanted = tuple(batch.labels[row][batch.answer_mask[row]].tolist())
                said = tuple(
                    logits[row][batch.predicting[row][at[row]]].argmax(-1).tolist()
                )
                ids = (
                    topk_ids(logits[row], top[query]).to("cpu", torch.int32)
                    if everywhere
                    else None
                )
                answers[query] = Answer(None, said, wanted, ids)
                limit = limit_of(_bare(query)) if max_new_tokens else 0
                if (
                    said == wanted
                    and len(wanted) <= limit
                    and _continues(backbone, query)
                ):
                    after = int(logits[row][-1].argmax())
                    if len(wanted) == limit or backbone.stops(after):
                        texts[_bare(query)] = backbone.decode(wanted)
    if not max_new_tokens:
        return answers
    # where greedy decoding is known to give the answer that was fed in, and to stop, there is nothing to generate
    rest = [
        question
        for question in dict.fromkeys(map(_bare, distinct))
        if question not in texts
    ]
    for group in _chunks(rest, batch_size):
        said_freely = backbone.generate(
            group, max_new_tokens=[limit_of(question) for question in group]
        )
        texts.update(zip(group, said_freely, strict=True))
    return {
        query: Answer(texts[_bare(query)], a.said, a.wanted, a.top)
        for query, a in answers.items()
    }


def answer_limits(
    backbone: VisionLanguageModel, cases: Iterable[EditCase]
) -> dict[Query, int]:
    """Return for each question of some cases, without its answer, what the longest target of its case needs."""
    limits: dict[Query, int] = {}
    for case in cases:
        queries = [query for _, asked in case.columns() for query in asked]
        needed = max(tokens_for(backbone, queries))
        for question in map(_bare, queries):
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
    return [max(least, len(row) + MARGIN) if row else least for row in ids]


@torch.no_grad()
def target_losses(
    backbone: VisionLanguageModel, queries: Sequence[Query], batch_size: int = 16
) -> list[float]:
    """Return for each query the mean cross entropy of its target's tokens, in float32."""
    losses: list[float] = []
    for group in _chunks(queries, batch_size):
        batch = backbone.batch(group)
        logits = backbone.logits(batch)
        for row, positions, labels, answer in zip(
            logits, batch.predicting, batch.labels, batch.answer_mask, strict=True
        ):
            losses.append(
                float(
                    F.cross_entropy(
                        row[positions].float(), labels[answer].to(row.device)
                    )
                )
            )
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
    whole, question = (
        backbone.encode(query),
        backbone.encode(_bare(query), with_answer=False),
    )
    return whole.ids[: -whole.n_answer] == question.ids


def _bare(query: Query) -> Query:
    return replace(query, target="")


def _chunks(queries: Sequence[Query], size: int) -> Iterator[Sequence[Query]]:
    return (queries[start : start + size] for start in range(0, len(queries), size))
