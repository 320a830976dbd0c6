"""How the networks of LiveEdit are trained: the edits of a batch share their experts, and the routers tell them apart.

The losses and random choices are those of the published `liveedit.py`; `compat: reference` has its mistakes too.
B cases, S sequences (B requests first, then generality, then locality), T tokens, D width, F = k * m features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mmedit_cli.errors import DataError
from mmedit_cli.knowledge.methods.liveedit.experts import adapt, soft_weights
from mmedit_cli.knowledge.methods.liveedit.hparams import LiveEditTraining
from mmedit_cli.knowledge.methods.liveedit.names import agreement
from mmedit_cli.knowledge.methods.liveedit.naming import Naming
from mmedit_cli.knowledge.methods.liveedit.networks import LiveEditNetworks
from mmedit_cli.knowledge.methods.shared.draws import one_of
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.batch import Prefix
from mmedit_cli.types import EditCase, Query

# codes of the items of a case; generality is 1, 2, ... by name
REQUEST = 0
LOCALITY = -1
_TINY = 1e-8  # inside logarithms, as published


@dataclass(frozen=True)
class Items:
    """The sequences of a batch: queries (S,), the case of each (S,), and its code."""

    queries: tuple[Query, ...]
    case: Tensor
    code: Tensor
    names: tuple[str, ...]  # of the generality codes 1, 2, ...

    def upto(self, cases: int) -> Items:
        """Return the sequences of the first cases."""
        is_first = self.case < cases
        kept = is_first.nonzero()[:, 0]
        queries = [self.queries[i] for i in kept.tolist()]
        return Items(
            queries=tuple(queries),
            case=self.case[kept],
            code=self.code[kept],
            names=self.names,
        )

    def place(self, codes: Tensor) -> Tensor:
        """Return the sequence of each case that has the given code: (B,) -> (B,)."""
        cases = torch.arange(len(codes))
        cases = cases[:, None]
        codes = codes[:, None]
        found = (self.case == cases) & (self.code == codes)
        return found.int().argmax(1)


@dataclass(frozen=True)
class Draws:
    """The random choices of a step.

    allowed: (S, B) bool, the experts a sequence may use; each pair of (B,) tensors names the sequences whose queries
    are compared (first) with experts (second): those that belong together, and those of a case that do not.
    """

    allowed: Tensor
    neighbour: tuple[Tensor, Tensor]
    sentinel: tuple[Tensor, Tensor]


def choose_items(
    cases: Sequence[EditCase],
    source: Generator,
    generality: str = "all",
    locality: str = "one",
) -> Items:
    """Draw one query with a picture for each name of generality, and one for locality, from each case.

    With generality `one`, a single name is drawn for each case; a step then costs less. With locality `all`, every
    locality query takes part.
    """
    names = _generality_names(cases)
    picked = [
        _Item(i, REQUEST, case.request)  # requests come first
        for i, case in enumerate(cases)
    ]
    picked += _generality_items(
        cases,
        names,
        source,
        generality,
    )
    for i, case in enumerate(cases):
        every = case.locality.values()
        queries = [query for some in every for query in _with_picture(some)]
        if not queries:
            raise DataError(
                f"{case.place}: {case.uid} has no locality query with a picture",
                "liveedit trains on one",
            )
        if locality == "one":
            queries = [one_of(queries, source)]
        picked += [_Item(i, LOCALITY, query) for query in queries]
    return Items(
        queries=tuple(item.query for item in picked),
        case=torch.tensor([item.case for item in picked]),
        code=torch.tensor([item.code for item in picked]),
        names=names,
    )


class _Item(NamedTuple):
    case: int
    code: int
    query: Query


def _generality_names(cases: Sequence[EditCase]) -> tuple[str, ...]:
    """Return the names of generality under which any case has a query with a picture."""
    names: dict[str, None] = {}
    for case in cases:
        for name, queries in case.generality.items():
            if _with_picture(queries):
                names[name] = None
    return tuple(names)


def _generality_items(
    cases: Sequence[EditCase],
    names: Sequence[str],
    source: Generator,
    generality: str,
) -> list[_Item]:
    """Draw a query of each case for each name it has, or with `one` for a single name."""
    wanted: list[Sequence[int]] = [range(len(names))] * len(cases)
    if generality == "one":
        wanted = [_one_name(case, names, source) for case in cases]
    picked: list[_Item] = []
    for number, name in enumerate(names):
        for i, case in enumerate(cases):
            queries = _with_picture(case.generality.get(name, ()))
            if not queries or number not in wanted[i]:
                continue
            drawn = _below(len(queries), source)
            item = _Item(i, number + 1, queries[drawn])
            picked.append(item)
    return picked


def _one_name(case: EditCase, names: Sequence[str], source: Generator) -> list[int]:
    """Draw the number of one name that the case has; none where it has no name."""
    having = [
        number
        for number, name in enumerate(names)
        if _with_picture(case.generality.get(name, ()))
    ]
    if not having:
        return []
    return [one_of(having, source)]


def draw(items: Items, source: Generator, compat: str) -> Draws:
    """Draw which experts each sequence may use, and which sequences the routers compare.

    In `reference` the experts beside the own one are the first of the batch, as published.
    """
    size = int(items.case.max()) + 1
    kind = items.code.clamp(max=1) % 3  # 0 request, 1 generality, 2 locality
    pools = _pools(size, source, compat)
    allowed = pools[kind, items.case]
    own = F.one_hot(items.case, size).bool()
    is_about = kind != 2
    own = own & is_about[:, None]

    # two items of one case that belong together: both of the edit, or both its locality
    generality = _codes(items, size, source)
    chosen = torch.randint(
        3,
        (size,),
        generator=source,
    )
    not_request = torch.where(
        chosen == 1,
        generality,
        LOCALITY,
    )
    first = torch.where(
        chosen == 0,
        REQUEST,
        not_request,
    )
    partner = _request_or_generality(
        items,
        size,
        source,
    )
    second = torch.where(
        first == LOCALITY,
        LOCALITY,
        partner,
    )
    # two that do not: one of the edit and one of its locality, in either order
    edit = _request_or_generality(
        items,
        size,
        source,
    )
    local = torch.full_like(edit, LOCALITY)
    swapped = _coin(size, source)
    queries = torch.where(swapped, local, edit)
    keys = torch.where(swapped, edit, local)
    return Draws(
        allowed=allowed | own,
        neighbour=(items.place(first), items.place(second)),
        sentinel=(items.place(queries), items.place(keys)),
    )


def _pools(size: int, source: Generator, compat: str) -> Tensor:
    """Draw for each case and kind of item (request, generality, locality) the experts it may use: (3, B, B) bool."""
    counts = torch.randint(
        size + 1,
        (3, size),
        generator=source,
    )
    order = torch.arange(size)
    order = order.expand(3, size, size)
    if compat == "correct":
        noise = torch.rand(
            3,
            size,
            size,
            generator=source,
        )
        by_noise = noise.argsort(2)
        order = by_noise.argsort(2)
    return order < counts[:, :, None]


def _request_or_generality(items: Items, size: int, source: Generator) -> Tensor:
    """Draw a code of each case: its request, or as often one of its generality: (B,)."""
    is_request = _coin(size, source)
    generality = _codes(items, size, source)
    return torch.where(
        is_request,
        REQUEST,
        generality,
    )


def _coin(size: int, source: Generator) -> Tensor:
    return torch.rand(size, generator=source) < 0.5


@dataclass(frozen=True)
class Place:
    """Where networks are trained: the model, the layer their experts are added at, and which process this is.

    `naming` asks the model for the names of pictures, where they are compared.
    """

    backbone: VisionLanguageModel
    layer: int
    rank: int = 0
    world: int = 1
    naming: Naming | None = None


def losses_of(
    networks: LiveEditNetworks,
    place: Place,
    items: Items,
    draws: Draws,
    others: Sequence[Query] = (),
) -> dict[str, Tensor]:
    """Return the losses of given sequences and choices by name, `total` among them.

    `others` are further edits for the routers to choose among. Each of several processes runs the upper layers on its
    share of the cases; the gradients of all add up to those of one process with the whole batch.
    """
    backbone = place.backbone
    hp = networks.hparams.training
    size = draws.allowed.shape[1]
    with torch.no_grad():
        batch = backbone.batch(items.queries)
        prefix = backbone.prefix(batch, place.layer)
        means = backbone.mean_image_tokens(prefix.batch)
    similarities = _similarities(
        networks,
        place,
        prefix,
        means,
        size,
        others,
    )
    margin = similarities.by_vision - similarities.sentinel
    score = networks.score(similarities.by_prompt, margin)

    taught = size if hp.taught is None else min(size, hp.taught)
    share = [
        row
        for row, case in enumerate(items.case.tolist())
        if case < taught and case % place.world == place.rank
    ]
    allowed = draws.allowed[:, :taught].to(score.device)
    weight = soft_weights(
        score[:, :taught],
        allowed,
        gated=networks.published,
    )
    requests = backbone.select(prefix, range(taught))
    experts = networks.experts(requests, backbone)
    stream = _Stream(
        prefix=backbone.select(prefix, share),
        code=items.code[share].to(score.device),
        items=items.upto(taught),
    )
    losses = _edit_losses(
        networks,
        place,
        stream,
        experts,
        weight[share],
    )
    if networks.published:
        routing = _published_routing(
            hp,
            draws,
            similarities,
        )
    else:
        asked = (*items.queries[:size], *others)
        targets = [query.target for query in asked]
        routing = {"soft_routing": _joint_routing(items, score, targets)}
    total = hp.reliability * losses["reliability"]
    total = total + hp.generality * losses["generality"]
    total = total + hp.locality * losses["locality"]
    for name, loss in routing.items():
        is_soft = name.startswith("soft")
        factor = hp.soft_routing if is_soft else hp.hard_routing
        total = total + factor * loss / place.world
    return {**losses, **routing, "total": total}


@dataclass(frozen=True)
class _Similarities:
    """How near S queries and N experts are: (S, N) each; sentinel: what an expert has to beat, (S, 1)."""

    by_prompt: Tensor
    by_vision: Tensor
    sentinel: Tensor


def _similarities(
    networks: LiveEditNetworks,
    place: Place,
    prefix: Prefix,
    means: Tensor,
    size: int,
    others: Sequence[Query],
) -> _Similarities:
    """Compare every sequence with the experts of the first `size`, the requests, and of the other edits.

    The published routers compare with all sequences instead, also with those that no expert is made of.
    """
    backbone = place.backbone
    batch = prefix.batch
    vision, prompt, sentinel = networks.ask(
        prefix.hidden,
        batch.prompt_mask,
        batch.image_mask,
        means,
    )
    if networks.published:
        vision_keys, prompt_keys = networks.keys(prefix, means)
    else:
        requests = backbone.select(prefix, range(size))
        vision_keys, prompt_keys = networks.keys(requests, means[:size])
    if others and not networks.published:
        with torch.no_grad():
            more = backbone.batch(others)
            more_prefix = backbone.prefix(more, place.layer)
            more_means = backbone.mean_image_tokens(more)
            more_vision, more_prompt = networks.keys(more_prefix, more_means)
        vision_keys = torch.cat((vision_keys, more_vision))
        prompt_keys = torch.cat((prompt_keys, more_prompt))
    by_vision = networks.similarity(vision, vision_keys)
    by_prompt = networks.similarity(prompt, prompt_keys)
    if place.naming is not None:
        names = place.naming.of(batch)
        name_keys = names[:size]
        if others:
            more_names = place.naming.of(more)
            name_keys = torch.cat((name_keys, more_names))
        agreed = agreement(names, name_keys)
        by_vision = by_vision + networks.named(agreed)
    return _Similarities(
        by_prompt,
        by_vision,
        sentinel,
    )


@dataclass(frozen=True)
class _Stream:
    """Sequences of this process at the edit layer, their codes (R,), and the items of all processes."""

    prefix: Prefix
    code: Tensor
    items: Items


def _edit_losses(
    networks: LiveEditNetworks,
    place: Place,
    stream: _Stream,
    experts: tuple[Tensor, Tensor],
    weight: Tensor,
) -> dict[str, Tensor]:
    """Return the losses of the adapted model on requests and generality (cross entropy) and locality (KL).

    Each is the mean over the rows of all processes; a row counts by the mean over its tokens.
    """
    backbone = place.backbone
    hp = networks.hparams.training
    prefix = stream.prefix
    code = stream.code
    batch = prefix.batch
    normed = networks.stream_norm(prefix.hidden.float())
    if hp.compat == "reference":
        # published: the output of the edit layer goes through the edit layer again
        with torch.no_grad():
            again = backbone.prefix_of(
                prefix.hidden,
                batch,
                place.layer - 1,
            )
            prefix = backbone.advance(again, place.layer)
    hidden = adapt(prefix.hidden, normed, *experts, weight)
    at, labels = batch.target_positions(backbone.end_id, with_end=hp.teach_end)
    is_local = code == LOCALITY
    at_local = at & is_local[:, None]
    adapted = backbone.resume(replace(prefix, hidden=hidden), at).float()
    with torch.no_grad():
        base = backbone.resume(prefix, at_local).float()
    local = at_local[at]
    token_losses = F.cross_entropy(
        adapted,
        labels[at],
        reduction="none",
    )
    shift = F.kl_div(
        base.log_softmax(-1),
        adapted[local].log_softmax(-1),
        log_target=True,
        reduction="none",
    )
    token_losses = token_losses.masked_scatter(local, shift.sum(-1))
    row = at.nonzero()[:, 0]
    zeros = torch.zeros(len(at), device=at.device)
    row_losses = zeros.index_add(0, row, token_losses) / at.sum(1)

    def mean(number: int) -> Tensor:
        own = row_losses[code == number]
        counted = stream.items.code == number
        count = counted.sum()
        return own.sum() / count.clamp(min=1)

    generality = {
        f"generality_{name}": mean(number)
        for number, name in enumerate(stream.items.names, 1)
    }
    nothing = row_losses.new_zeros(())
    return {
        "reliability": mean(REQUEST),
        **generality,
        "generality": torch.stack([nothing, *generality.values()]).sum(),
        "locality": mean(LOCALITY),
    }


def _published_routing(
    hp: LiveEditTraining, draws: Draws, similarities: _Similarities
) -> dict[str, Tensor]:
    """Return the published routing losses from the similarities of all S sequences with each other.

    The prompt decides the soft ones: the own edit against the others (relative), and by itself (absolute). The picture
    decides the hard ones: a related query passes (neighbour), and an unrelated one loses to the sentinel.
    """
    queries, keys = draws.neighbour
    table = similarities.by_prompt[queries][:, keys]
    relative = table.log_softmax(1)
    neighbour = _with_sentinel(
        similarities,
        queries,
        keys,
    )
    unrelated = _with_sentinel(similarities, *draws.sentinel)
    return {
        "soft_relative": -relative.diagonal().mean(),
        "soft_absolute": _absolute(table, hp.compat),
        "hard_neighbour": -neighbour.diagonal().mean(),
        "hard_sentinel": -unrelated[:, -1].mean(),
    }


def _with_sentinel(
    similarities: _Similarities, queries: Tensor, keys: Tensor
) -> Tensor:
    """Return log-probabilities of choosing among keys and the sentinel, the last, by the picture: (B, B + 1)."""
    table = similarities.by_vision[queries][:, keys]
    sentinel = similarities.sentinel[queries]
    choices = torch.cat((table, sentinel), 1)
    return choices.log_softmax(1)


def _joint_routing(items: Items, score: Tensor, targets: Sequence[str]) -> Tensor:
    """Return the cross entropy of choosing among N experts and none, from scores (S, N); the first B are the batch's.

    The right choice is the own expert for a request and its generality, and none for locality. Experts with the same
    answer (`targets`) are left out: a fact that is edited with several pictures has an expert for each, and none of
    them is wrong.
    """
    number: dict[str, int] = {}
    for target in targets:
        number.setdefault(target, len(number))
    answers = torch.tensor([number[target] for target in targets])
    asked = answers[items.case]
    experts = torch.arange(len(targets))
    is_local = items.code == LOCALITY
    same_answer = asked[:, None] == answers
    other_expert = items.case[:, None] != experts
    alike = same_answer & other_expert & ~is_local[:, None]
    alike = alike.to(score.device)
    columns = score.masked_fill(alike, float("-inf"))
    no_expert = torch.zeros_like(score[:, :1])
    columns = torch.cat((columns, no_expert), 1)
    last = score.shape[1]
    right = torch.where(is_local, last, items.case)
    right = right.to(score.device)
    return F.cross_entropy(columns, right)


def _absolute(table: Tensor, compat: str) -> Tensor:
    """Return the absolute loss of prompt similarities (B, B): the own edit is to be likely, the others are not.

    `reference`: of the others only the one before, as published.
    """
    likely = table.sigmoid()
    unlikely = (1 - likely + _TINY).log()
    own = (likely.diagonal() + _TINY).log()
    size = len(table)
    if compat == "reference":
        index = torch.arange(size, device=table.device)
        others = unlikely[index, index - 1]
    else:
        all_but_own = unlikely.sum(1) - unlikely.diagonal()
        others = all_but_own / (size - 1)
    return -(own + others).mean()


def _codes(items: Items, size: int, source: Generator) -> Tensor:
    """Draw a generality code for each case, 0 where it has none."""
    has = torch.zeros(size, len(items.names) + 1)
    is_generality = items.code > 0
    cases = items.case[is_generality]
    codes = items.code[is_generality]
    has[cases, codes] = 1.0
    has_none = has.sum(1) == 0
    has[has_none, 0] = 1.0
    return torch.multinomial(
        has,
        1,
        generator=source,
    )[:, 0]


def _with_picture(queries: Sequence[Query]) -> list[Query]:
    return [query for query in queries if query.image is not None]


def _below(n: int, source: Generator) -> int:
    return int(torch.randint(n, (1,), generator=source))
