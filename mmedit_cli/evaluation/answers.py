"""What a model answers to a list of queries: freely generated, and at each position of the given answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmedit_cli.backbones.base import Batch, Features, VisionLanguageModel
from mmedit_cli.evaluation.metrics import topk_ids
from mmedit_cli.pictures import Picture
from mmedit_cli.prefix import Prefix, RowCache
from mmedit_cli.types import Query


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


@dataclass(frozen=True)
class Caches:
    """Frozen rows that many questions share: image tokens by picture, and what enters `layer` by query."""

    layer: int
    features: Features
    prefixes: RowCache[Query]


def make_caches(
    backbone: VisionLanguageModel, layer: int, queries: Sequence[Query], *, batch_size: int, budget: int
) -> Caches:
    """Plan the caches for all queries of a run; nothing is computed yet. `budget`: bytes in memory, the rest spills.

    The plan depends on the queries alone, so an interrupted run that goes on computes the same bits.
    """
    features: Features = RowCache(
        lambda pictures: list(backbone.image_features(pictures)), group=batch_size, budget=budget // 4, spill=True
    )

    def compute(group: Sequence[Query]) -> list[Tensor]:
        batch = backbone.batch(group)
        hidden = backbone.prefix(batch, layer, features).hidden
        return [row[:length] for row, length in zip(hidden, batch.lengths, strict=True)]

    prefixes: RowCache[Query] = RowCache(compute, group=batch_size, budget=budget - budget // 4, spill=True)
    distinct = _by_length(backbone, dict.fromkeys(queries))
    features.plan([Picture(q.image, q.background) for q in distinct if q.image is not None])
    prefixes.plan(distinct)
    return Caches(layer, features, prefixes)


@torch.no_grad()
def ask(
    backbone: VisionLanguageModel,
    queries: Sequence[Query],
    *,
    top: Mapping[Query, int],
    max_new_tokens: int,
    batch_size: int,
    caches: Caches | None,
) -> dict[Query, Answer]:
    """Ask every distinct query once and return the answers; the batches depend on the queries alone.

    `top` names the queries for which the k best ids at every position are wanted; `max_new_tokens` 0 skips generation.
    """
    distinct = _by_length(backbone, dict.fromkeys(queries))
    texts = _generate(backbone, distinct, max_new_tokens, batch_size, caches) if max_new_tokens else {}
    answers: dict[Query, Answer] = {}
    for everywhere in (True, False):
        for group in _chunks([query for query in distinct if (query in top) == everywhere], batch_size):
            batch = backbone.batch(group)
            at = batch.attention_mask.bool() if everywhere else batch.predicting
            # the head runs on the positions that are read, and on no other
            logits = backbone.resume(_prefix(backbone, batch, caches), at).split(at.sum(1).tolist())
            for row, query in enumerate(group):
                wanted = tuple(batch.labels[row][batch.answer_mask[row]].tolist())
                read = logits[row][batch.predicting[row][at[row]]]
                ids = topk_ids(logits[row], top[query]).to("cpu", torch.int32) if everywhere else None
                answers[query] = Answer(texts.get(_bare(query)), tuple(read.argmax(-1).tolist()), wanted, ids)
    return answers


def _prefix(backbone: VisionLanguageModel, batch: Batch, caches: Caches | None) -> Prefix:
    if caches is None:
        return backbone.prefix(batch, 0)
    rows = caches.prefixes.get(batch.queries)
    hidden = pad_sequence(rows, batch_first=True).to(backbone.device)
    return backbone.prefix_of(hidden, batch.attention_mask, caches.layer)


def _generate(
    backbone: VisionLanguageModel,
    queries: Sequence[Query],
    max_new_tokens: int,
    batch_size: int,
    caches: Caches | None,
) -> dict[Query, str]:
    features = None if caches is None else caches.features
    texts: dict[Query, str] = {}
    for group in _chunks(list(dict.fromkeys(_bare(query) for query in queries)), batch_size):
        said = backbone.generate(group, max_new_tokens=max_new_tokens, features=features)
        texts.update(zip(group, said, strict=True))
    return texts


def _bare(query: Query) -> Query:
    """The question without its answer: queries that differ in nothing else are generated once."""
    return replace(query, target="")


def _by_length(backbone: VisionLanguageModel, queries: Mapping[Query, None]) -> list[Query]:
    """Sort by the number of tokens, so that little of a batch is padding; the order given breaks ties."""
    return sorted(queries, key=lambda query: len(backbone.encode(query).ids))


def _chunks(queries: Sequence[Query], size: int) -> Iterator[Sequence[Query]]:
    return (queries[start : start + size] for start in range(0, len(queries), size))
