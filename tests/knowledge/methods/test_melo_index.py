"""The router of multi-melo: its vector index against brute force, MELO's clusters and both scores against the code."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mmedit_cli.knowledge.methods.multi_melo.clusters import ClusterIndex
from mmedit_cli.knowledge.methods.multi_melo.index import (
    DUPLICATE,
    Keys,
    VectorIndex,
    published_distance,
    within_reach,
)
from mmedit_cli.knowledge.methods.shared.lora_blocks import (
    Blocks,
    add_blocks,
    fresh_blocks,
)
from mmedit_cli.runtime import generator

REACH = {"question": 0.4, "image": 0.6}
NOBODY = -100  # in the fixtures


def keys_of(n, seed=0, seen=True, near=None, spread=0.3):
    """Random keys; `near`: around those of other keys."""
    source, parts = generator(seed), {}
    for name, width in (("question", 8), ("image", 12)):
        part = torch.randn(n, width, generator=source)
        if near is not None:
            part = near.parts[name][torch.arange(n) % len(near)] + spread * part
        parts[name] = F.normalize(part, dim=-1)
    return Keys(parts, torch.full((n,), seen))


def index_of(keys, labels):
    index = VectorIndex(within_reach(REACH))
    index.insert(keys, labels)
    return index


def test_the_order_in_which_parts_are_named_does_not_matter():
    """Keys read from a file name their parts in any order; parts of one width were once taken for each other."""
    keys = keys_of(100)
    keys.parts["question"] = F.pad(keys.parts["question"], (0, 4))
    labels = [str(i) for i in range(100)]
    backwards = Keys(dict(reversed(keys.parts.items())), keys.seen)
    index = index_of(backwards[:3], labels[:3])
    index.insert(keys[3:70], labels[3:70])  # into more room
    index.insert(keys[70:], labels[70:])  # into the room there is
    for name, part in keys.parts.items():
        assert torch.equal(index.keys.parts[name], part), name


def test_every_key_goes_to_its_own_newest_row_among_a_thousand_that_contradict_each_other():
    base = keys_of(100)
    keys = keys_of(1000, 1, near=base, spread=0.1)
    twins = torch.arange(0, 1000, 10)
    for part in keys.parts.values():  # every tenth asks what the row before it asks
        part[twins[1:]] = part[twins[1:] - 1]
    index = index_of(keys, [str(i % 7) for i in range(1000)])
    expected = torch.arange(1000)
    expected[twins[1:] - 1] = twins[1:]
    assert torch.equal(index.search(keys), expected)
    assert index.hidden.sum() == len(twins) - 1


def test_balls_of_different_labels_never_overlap_and_equal_labels_keep_theirs():
    keys, labels = (
        keys_of(200, 2, near=keys_of(20), spread=0.2),
        [str(i % 3) for i in range(200)],
    )
    index = index_of(keys, labels)
    apart = within_reach(REACH)(keys, keys)
    other = torch.tensor([[a != b for b in labels] for a in labels]) & (
        apart >= DUPLICATE
    )
    assert ((index.radii[:, None] + index.radii)[other] <= apart[other] + 1e-6).all()
    assert (index.radii < 1).any()
    assert torch.equal(index_of(keys, ["one"] * 200).radii, torch.ones(200))


def test_two_that_contradict_each_other_part_in_the_middle_and_the_same_question_is_taken_over():
    one = keys_of(1, 3)
    near = Keys(
        {
            **one.parts,
            "image": F.normalize(
                one.parts["image"] + 0.2 * keys_of(1, 4).parts["image"], dim=-1
            ),
        },
        one.seen,
    )
    apart = float(within_reach(REACH)(one, near))
    assert DUPLICATE < apart < 1
    index = index_of(Keys.join([one, near]), ["a", "b"])
    assert index.radii.tolist() == pytest.approx([apart / 2] * 2, rel=1e-4)
    index.insert(one, ["b"])
    assert index.hidden.tolist() == [True, False, False]
    assert index.search(one).tolist() == [2]
    without = index_of(Keys.join([one, near]), ["a", "b"])
    assert without.search(one).tolist() == [0], "taken out, the older one answers again"


def test_rows_of_one_label_that_ask_the_same_hide_none_and_bound_none():
    one = keys_of(1, 3)
    index = index_of(Keys.join([one, one, one]), ["a", "a", "a"])
    assert index.hidden.tolist() == [False] * 3
    assert index.radii.tolist() == [1, 1, 1]
    assert index.search(one).tolist() == [2], "the newest of equals"


def test_a_row_that_takes_over_keeps_its_radius():
    one = keys_of(1, 3)
    index = index_of(Keys.join([one, one]), ["a", "b"])
    assert index.hidden.tolist() == [True, False]
    assert index.radii.tolist() == [1, 1]


def test_a_distance_equal_to_the_radius_is_inside():
    index = VectorIndex(lambda query, rows: query.parts["at"] - rows.parts["at"].T)
    index.insert(
        Keys({"at": torch.zeros(1, 1)}, torch.ones(1, dtype=torch.bool)), ["a"]
    )
    at = torch.tensor([[1.0], [1.0 + 1e-6], [0.0]])
    assert index.search(Keys({"at": at}, torch.ones(3, dtype=torch.bool))).tolist() == [
        0,
        -1,
        0,
    ]


def test_the_search_is_that_of_a_loop_in_double_precision_whatever_the_order():
    keys, labels = (
        keys_of(300, 5, near=keys_of(40), spread=0.4),
        [str(i % 11) for i in range(300)],
    )
    queries = keys_of(400, 6, near=keys, spread=0.15)
    index = index_of(keys, labels)
    apart = torch.stack(
        [
            (1 - queries.parts[n].double() @ keys.parts[n].double().T) / reach
            for n, reach in REACH.items()
        ]
    ).amax(0)
    between = torch.stack(
        [
            (1 - keys.parts[n].double() @ keys.parts[n].double().T) / reach
            for n, reach in REACH.items()
        ]
    ).amax(0)
    radii = [
        min([1.0, *(between[i, j] / 2 for j in range(300) if labels[i] != labels[j])])
        for i in range(300)
    ]
    found = index.search(queries).tolist()
    for q in range(400):
        inside = [
            (float(apart[q, i] - radii[i]), i)
            for i in range(300)
            if apart[q, i] <= radii[i]
        ]
        assert found[q] == (min(inside)[1] if inside else -1)
    order = torch.randperm(300, generator=generator(7))
    other = index_of(keys[order], [labels[i] for i in order])
    assert [
        -1 if i < 0 else int(order[i]) for i in other.search(queries).tolist()
    ] == found
    assert -1 in found
    assert len(set(found)) > 50


def test_rows_in_pieces_are_rows_at_once():
    keys, labels = (
        keys_of(300, 8, near=keys_of(30), spread=0.2),
        [str(i % 5) for i in range(300)],
    )
    pieces = VectorIndex(within_reach(REACH))
    for start in range(0, 300, 7):
        pieces.insert(keys[start : start + 7], labels[start : start + 7])
    whole = index_of(keys, labels)
    assert torch.allclose(pieces.radii, whole.radii, atol=1e-6)
    assert torch.equal(pieces.hidden, whole.hidden)


def test_with_a_picture_and_without_never_meet():
    seeing, blind = keys_of(3), keys_of(3, seen=False)
    index = index_of(Keys.join([seeing, blind]), list("abcdef"))
    assert index.search(seeing).tolist() == [0, 1, 2]
    assert index.search(blind).tolist() == [3, 4, 5]


def test_melos_clusters_do_what_the_published_code_does(golden):
    trace = load_file(golden / "melo_cluster_database.safetensors")
    radius = json.loads((golden / "melo_cluster_database.json").read_text())[
        "settings"
    ]["init_radius"]
    index = ClusterIndex(radius, together=True)
    for step in range(sum(name.endswith(".blocks") for name in trace) - 1):
        at = {
            name.partition(".")[2]: t
            for name, t in trace.items()
            if name.startswith(f"insert{step:02d}.")
        }
        if index.clusters:
            distances, rows = index.nearest(at["keys"])
            assert torch.allclose(distances, at["nearest_distance"], atol=1e-5)
            assert torch.equal(rows, at["nearest_row"])
        labels = at["labels"].clamp(min=0).sum(1)
        index.add(at["keys"], labels.tolist(), at["blocks"].tolist())
        found = index.clusters
        assert torch.allclose(
            torch.stack([c.centre for c in found]), at["after.centres"], atol=1e-5
        )
        assert torch.allclose(
            torch.tensor([c.radius for c in found]), at["after.radii"], atol=1e-5
        )
        points = [
            (row, *point)
            for row, cluster in enumerate(found)
            for point in cluster.points
        ]
        assert [row for row, _, _ in points] == at["after.points_row"].tolist()
        assert [NOBODY if b < 0 else b for _, _, b in points] == at[
            "after.points_block"
        ].tolist()
        assert torch.allclose(
            torch.stack([key for _, key, _ in points]),
            at["after.points_key"],
            atol=1e-5,
        )
        assert [c.label for c in found] == at["after.row_label_sum"].tolist()
        assert [index.conflicts, index.forgotten] == at["after.counters"][:2].tolist()
    queries = Keys(
        {"token": trace["query.keys"]},
        torch.ones(len(trace["query.keys"]), dtype=torch.bool),
    )
    blocks = [NOBODY if b < 0 else b for b in index.search(queries).tolist()]
    assert blocks == trace["query.blocks"].tolist()


def test_the_nearest_centre_is_found_however_many_there_are():
    keys = torch.eye(40)
    index = ClusterIndex(0.1)
    for number, key in enumerate(keys):
        index.add(key[None], [number], [number])
    index.add(1.05 * keys[3:4], [3], [40])
    distances, numbers = index.nearest(keys)
    assert numbers.tolist() == list(range(40))
    assert torch.equal(distances[:3], torch.zeros(3))
    # the mean of the two points of a cluster is its centre
    assert distances[3] == pytest.approx(0.025, abs=1e-6)


def test_the_published_scores_and_their_threshold(golden):
    case = {
        n.partition(".")[2]: t
        for n, t in load_file(golden / "multi_melo_router.safetensors").items()
    }
    rows = Keys(
        {"question": _unit(case["key_text"]), "image": _unit(case["key_image"])},
        torch.ones(9, dtype=torch.bool),
    )
    parts = {"question": _unit(case["query_text"]), "image": _unit(case["query_image"])}
    index = VectorIndex(published_distance, radius=0.35, resolve=False)
    index.insert(rows, ["same"] * 9)
    for seen, expected in ((True, "blocks"), (False, "blocks_without_image")):
        queries = Keys(parts, torch.full((30,), seen))
        if seen:
            assert torch.allclose(
                published_distance(queries, rows), case["D"], atol=1e-5
            )
        found = [
            NOBODY if row < 0 else int(case["key_block"][row])
            for row in index.search(queries).tolist()
        ]
        assert found == case[expected].tolist()


def test_in_the_published_index_the_first_of_equals_wins_for_ever():
    one = keys_of(1)
    index = VectorIndex(published_distance, radius=0.35, resolve=False)
    index.insert(Keys.join([one, one]), ["old", "new"])
    assert index.search(one).tolist() == [0]


@pytest.mark.parametrize("case", [0, 1])
def test_blocks_add_what_the_published_layer_adds_with_the_number_of_blocks_taken_out(
    golden, case
):
    about = json.loads((golden / "melo_dynamic_lora.json").read_text())["cases"][case]
    tensors = {
        n.partition(".")[2]: t
        for n, t in load_file(golden / "melo_dynamic_lora.safetensors").items()
        if n.startswith(f"case{case}.")
    }
    n, rank = about["blocks"], about["rank_per_block"]
    a, b = tensors["A"].clone().requires_grad_(), tensors["B"].clone().requires_grad_()
    ours = Blocks(
        {"x": torch.stack(a.split(rank, 1)) * n**0.5},
        {"x": torch.stack(b.split(rank, 0)) * n**0.5},
    )
    scale = about["total_factor"] / n
    for number, mapping in enumerate(about["mappings"]):
        at = {
            k.partition(".")[2]: t
            for k, t in tensors.items()
            if k.startswith(f"map{number}.")
        }
        rows = len(at["x"])
        index = torch.tensor(mapping * rows if len(mapping) == 1 else mapping)
        index = torch.where(index == NOBODY, -1, index)
        out = add_blocks(at["x"], at["out_base"], ours, "x", index, scale)
        if out is None:
            assert torch.equal(at["out"], at["out_base"])
            continue
        assert torch.allclose(out, at["out"], atol=1e-4, rtol=1e-4)
        assert torch.equal(out[index < 0], at["out_base"][index < 0])
        for gradient, expected in zip(
            torch.autograd.grad(out, (a, b), at["upstream_grad"], retain_graph=True),
            (at["grad_A"], at["grad_B"]),
            strict=True,
        ):
            assert torch.allclose(gradient, expected, atol=1e-4, rtol=1e-4)


def test_without_the_factor_of_the_number_of_blocks_adam_takes_the_same_steps():
    """(A, B, n, lr) as published against (A sqrt n, B sqrt n, lr sqrt n): the same change of the weight."""
    n, rank, width, out = 20, 2, 6, 5
    source = generator(0)
    x, y = (
        torch.randn(9, width, generator=source),
        torch.randn(9, out, generator=source),
    )
    ours = fresh_blocks({"x": (width, out)}, rank, [1])
    start = (ours.a["x"][0], ours.b["x"][0])
    changes = []
    for factor, rate in ((1.0, 1e-2), (n**-0.5, 1e-2 * n**-0.5)):
        a, b = ((tensor * factor).clone().requires_grad_() for tensor in start)
        optimizer = torch.optim.Adam([a, b], lr=rate, eps=1e-20)
        for _ in range(10):
            optimizer.zero_grad()
            ((x @ a @ b) / factor**2 - y).square().mean().backward()
            optimizer.step()
        changes.append((a @ b / factor**2).detach())
    assert torch.allclose(changes[0], changes[1], rtol=1e-4)
    assert changes[0].abs().max() > 1e-2


def test_a_new_block_is_drawn_in_the_width_of_its_own_rank():
    blocks = fresh_blocks({"x": (200, 30)}, 4, [1, 2])
    assert blocks.a["x"].shape == (2, 200, 4)
    assert 0.45 < blocks.a["x"].abs().max() <= 0.5
    assert not blocks.b["x"].any()
    assert not torch.equal(blocks.a["x"][0], blocks.a["x"][1])


def _unit(vectors):
    return F.normalize(vectors, dim=-1)
