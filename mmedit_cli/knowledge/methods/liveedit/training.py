"""How LiveEdit learns: edits of one batch share a pool of experts, and routers learn whose query is whose.

B cases, S sequences (B requests first, then generality, then locality), T tokens, D width, F = k * m features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mmedit_cli.errors import DataError
from mmedit_cli.knowledge.methods.liveedit.experts import adapt, soft_weights
from mmedit_cli.knowledge.methods.liveedit.hparams import LiveEditTraining
from mmedit_cli.knowledge.methods.liveedit.networks import LiveEditNetworks
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.batch import Prefix
from mmedit_cli.types import EditCase, Query

REQUEST, LOCALITY = (
    0,
    -1,
)  # codes of the items of a case; generality is 1, 2, ... by name
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
        kept = (self.case < cases).nonzero()[:, 0]
        return Items(
            tuple(self.queries[i] for i in kept.tolist()),
            self.case[kept],
            self.code[kept],
            self.names,
        )

    def place(self, codes: Tensor) -> Tensor:
        """Return the sequence of each case that has the given code: (B,) -> (B,)."""
        found = (self.case[None] == torch.arange(len(codes))[:, None]) & (
            self.code[None] == codes[:, None]
        )
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

    With `one`, a single name of generality is drawn for each case: a step costs less. With `all`, nothing is drawn of
    locality: every query takes part.
    """
    names = tuple(
        dict.fromkeys(n for c in cases for n, qs in c.generality.items() if _seeing(qs))
    )
    picked: list[tuple[int, int, Query]] = [
        (i, REQUEST, case.request) for i, case in enumerate(cases)
    ]
    asked = [range(len(names))] * len(cases)
    if generality == "one":
        having = [
            [
                k
                for k, name in enumerate(names)
                if _seeing(case.generality.get(name, ()))
            ]
            for case in cases
        ]
        asked = [k[(i := _below(len(k), source)) : i + 1] if k else () for k in having]
    for code, name in enumerate(names):
        for i, case in enumerate(cases):
            if code in asked[i] and (queries := _seeing(case.generality.get(name, ()))):
                picked.append((i, code + 1, queries[_below(len(queries), source)]))
    for i, case in enumerate(cases):
        queries = [q for qs in case.locality.values() for q in _seeing(qs)]
        if not queries:
            raise DataError(
                f"{case.place}: {case.uid} has no locality query with a picture",
                "liveedit trains on one",
            )
        drawn = (
            queries if locality == "all" else [queries[_below(len(queries), source)]]
        )
        picked += [(i, LOCALITY, query) for query in drawn]
    rows, codes, chosen = zip(*picked, strict=True)
    return Items(tuple(chosen), torch.tensor(rows), torch.tensor(codes), names)


def draw(items: Items, source: Generator, compat: str) -> Draws:
    """Make the random choices of section 2.5 and 2.6; `reference` takes prefixes of the batch as pools."""
    size = int(items.case.max()) + 1
    pools = torch.randint(
        size + 1, (3, size), generator=source
    )  # how many experts beside the own one
    order = torch.arange(size).expand(3, size, size)
    if compat == "correct":
        order = torch.rand(3, size, size, generator=source).argsort(2).argsort(2)
    subsets = order < pools[:, :, None]
    kind = items.code.clamp(max=1) % 3  # 0 request, 1 generality, 2 locality
    allowed = subsets[kind, items.case]
    own = F.one_hot(items.case, size).bool() & (kind != 2)[:, None]

    related = _codes(items, size, source)
    chosen = torch.randint(3, (size,), generator=source)
    a = torch.where(chosen == 0, 0, torch.where(chosen == 1, related, LOCALITY))
    again = torch.where(
        torch.rand(size, generator=source) < 0.5, 0, _codes(items, size, source)
    )
    b = torch.where(a == LOCALITY, LOCALITY, again)
    edit = torch.where(
        torch.rand(size, generator=source) < 0.5, 0, _codes(items, size, source)
    )
    local, swapped = (
        torch.full_like(edit, LOCALITY),
        torch.rand(size, generator=source) < 0.5,
    )
    return Draws(
        allowed | own,
        (items.place(a), items.place(b)),
        (
            items.place(torch.where(swapped, local, edit)),
            items.place(torch.where(swapped, edit, local)),
        ),
    )


@dataclass(frozen=True)
class Place:
    """Where networks are trained: the model, the layer their experts are added at, and which process this is."""

    backbone: VisionLanguageModel
    layer: int
    rank: int = 0
    world: int = 1


def losses_of(
    networks: LiveEditNetworks,
    place: Place,
    items: Items,
    draws: Draws,
    others: Sequence[Query] = (),
) -> dict[str, Tensor]:
    """Return the losses of given sequences and choices, `total` among them; `others` are more edits to choose among.

    With several processes each runs the upper layers on its share of the cases; their gradients add up to those of one
    process with the whole batch.
    """
    backbone, hp, size = (
        place.backbone,
        networks.hparams.training,
        draws.allowed.shape[1],
    )
    with torch.no_grad():
        prefix = backbone.prefix(backbone.batch(items.queries), place.layer)
        means = backbone.mean_image_tokens(prefix.batch)
    requests = backbone.select(prefix, range(size))
    vision, prompt, against = networks.ask(
        prefix.hidden, prefix.batch.prompt_mask, prefix.batch.image_mask, means
    )
    # the published routers also compare with what no edit is made of; the joint one with edits alone, and with more
    keys = (
        networks.keys(prefix, means)
        if networks.published
        else networks.keys(requests, means[:size])
    )
    if others and not networks.published:
        with torch.no_grad():
            batch = backbone.batch(others)
            more = networks.keys(
                backbone.prefix(batch, place.layer), backbone.mean_image_tokens(batch)
            )
        keys = (torch.cat((keys[0], more[0])), torch.cat((keys[1], more[1])))
    by_vision, by_prompt = (
        networks.similarity(vision, keys[0]),
        networks.similarity(prompt, keys[1]),
    )
    score = networks.score(by_prompt, by_vision - against)

    taught = size if hp.taught is None else min(size, hp.taught)
    share = [
        i
        for i, c in enumerate(items.case.tolist())
        if c < taught and c % place.world == place.rank
    ]
    weight = soft_weights(
        score[:, :taught],
        draws.allowed[:, :taught].to(score.device),
        gated=networks.published,
    )
    experts = networks.experts(backbone.select(requests, range(taught)), backbone)
    stream = _Stream(
        backbone.select(prefix, share),
        items.code[share].to(score.device),
        items.upto(taught),
    )
    losses = _edit_losses(networks, place, stream, experts, weight[share])
    if networks.published:
        routing = _published_routing(hp, draws, by_prompt, by_vision, against)
    else:
        targets = [query.target for query in (*items.queries[:size], *others)]
        routing = {"soft_routing": _joint_routing(items, score, targets)}
    total = (
        hp.reliability * losses["reliability"] + hp.generality * losses["generality"]
    )
    total = total + hp.locality * losses["locality"]
    for name, loss in routing.items():
        total = (
            total
            + (hp.soft_routing if name.startswith("soft") else hp.hard_routing)
            * loss
            / place.world
        )
    return {**losses, **routing, "total": total}


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
    """Return what the adapted model says about requests and generality (cross entropy) and locality (KL).

    Each is the mean over the rows of all processes; a row counts by the mean over its tokens.
    """
    backbone, hp = place.backbone, networks.hparams.training
    prefix, code, items = stream.prefix, stream.code, stream.items
    batch = prefix.batch
    normed = networks.stream_norm(prefix.hidden.float())
    if (
        hp.compat == "reference"
    ):  # published: the output of the edit layer goes through the edit layer again
        with torch.no_grad():
            again = backbone.prefix_of(prefix.hidden, batch, place.layer - 1)
            prefix = backbone.advance(again, place.layer)
    adapted_stream = adapt(prefix.hidden, normed, *experts, weight)
    at, labels = batch.target_positions(backbone.end_id)
    if not hp.teach_end:
        at = batch.predicting
    at_local = at & (code == LOCALITY)[:, None]
    adapted = backbone.resume(replace(prefix, hidden=adapted_stream), at).float()
    with torch.no_grad():
        base = backbone.resume(prefix, at_local).float()
    local = at_local[at]
    each = F.cross_entropy(adapted, labels[at], reduction="none")
    shift = F.kl_div(
        base.log_softmax(-1),
        adapted[local].log_softmax(-1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    each = each.masked_scatter(local, shift)
    rows = torch.zeros(len(at), device=at.device).index_add(
        0, at.nonzero()[:, 0], each
    ) / at.sum(1)

    def mean(number: int) -> Tensor:
        return rows[code == number].sum() / (items.code == number).sum().clamp(min=1)

    losses = {
        f"generality_{name}": mean(number) for number, name in enumerate(items.names, 1)
    }
    total = torch.stack([rows.new_zeros(()), *losses.values()]).sum()
    return {
        "reliability": mean(REQUEST),
        **losses,
        "generality": total,
        "locality": mean(LOCALITY),
    }


def _published_routing(
    hp: LiveEditTraining,
    draws: Draws,
    by_prompt: Tensor,
    by_vision: Tensor,
    against: Tensor,
) -> dict[str, Tensor]:
    """Return the four losses of section 2.6 on similarities (S, S); against: (S, 1), those with the sentinel."""
    a, b = draws.neighbour
    table = by_prompt[a][:, b]
    losses = {
        "soft_relative": -table.log_softmax(1).diagonal().mean(),
        "soft_absolute": _absolute(table, hp.compat),
        "hard_neighbour": -torch.cat((by_vision[a][:, b], against[a]), 1)
        .log_softmax(1)
        .diagonal()
        .mean(),
    }
    a, b = draws.sentinel
    losses["hard_sentinel"] = (
        -torch.cat((by_vision[a][:, b], against[a]), 1).log_softmax(1)[:, -1].mean()
    )
    return losses


def _joint_routing(items: Items, score: Tensor, targets: Sequence[str]) -> Tensor:
    """Return the cross entropy of choosing among all experts and none: (S, N), the first B of them of the batch.

    Right is the own expert for a request and its generality, none for locality. All the others take part, so that what
    is learned holds among many; but for those that say the same (`targets`): a fact that is edited by way of several
    pictures has an expert for each, and none of them is a wrong choice.
    """
    number = {target: i for i, target in enumerate(dict.fromkeys(targets))}
    says = torch.tensor([number[target] for target in targets])
    own = items.case[:, None] == torch.arange(len(targets))
    alike = (
        (says[items.case][:, None] == says) & ~own & (items.code != LOCALITY)[:, None]
    )
    columns = score.masked_fill(alike.to(score.device), float("-inf"))
    columns = torch.cat((columns, torch.zeros_like(score[:, :1])), 1)
    right = torch.where(items.code == LOCALITY, score.shape[1], items.case).to(
        score.device
    )
    return F.cross_entropy(columns, right)


def _absolute(table: Tensor, compat: str) -> Tensor:
    """Return the absolute loss of prompt similarities (B, B): the own edit is to be likely, the others are not.

    `reference`: of the others only the one before, as published.
    """
    likely = table.sigmoid()
    unlikely = (1 - likely + _TINY).log()
    size = len(table)
    if compat == "reference":
        index = torch.arange(size, device=table.device)
        others = unlikely[index, index - 1]
    else:
        others = (unlikely.sum(1) - unlikely.diagonal()) / (size - 1)
    return -((likely.diagonal() + _TINY).log() + others).mean()


def _codes(items: Items, size: int, source: Generator) -> Tensor:
    """Draw a generality code for each case, 0 where it has none."""
    has = torch.zeros(size, len(items.names) + 1)
    has[items.case[items.code > 0], items.code[items.code > 0]] = 1.0
    has[has.sum(1) == 0, 0] = 1.0
    return torch.multinomial(has, 1, generator=source)[:, 0]


def _seeing(queries: Sequence[Query]) -> list[Query]:
    return [query for query in queries if query.image is not None]


def _below(n: int, source: Generator) -> int:
    return int(torch.randint(n, (1,), generator=source))
