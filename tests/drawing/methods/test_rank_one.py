"""The gated rank-one edit: its algebra in float64, and numbers computed by published code."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from torch.nn import functional as F

from mmedit_cli.drawing.covariance import Covariance
from mmedit_cli.drawing.methods.perfusion.rank_one import (
    Gates,
    add_edit,
    dual,
    edit_rows,
    mixing,
    mixing_in_scope,
    similarity,
)

SHIPPED = ROOT.parent / "shared" / "data" / "perfusion" / "covariance_CLIP_ViT-L-14.pt"
D, OUT = 24, 10


def random(*shape, seed=0):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def setting(n=1, seed=0):
    """A covariance, n concepts, and a layer."""
    half = random(60, D, seed=seed)
    factor = torch.linalg.cholesky(half.T @ half / 60)
    inputs = random(n, D, seed=seed + 1) + 1.0  # overlapping: they share a direction
    return (
        factor,
        inputs,
        dual(factor, inputs),
        random(OUT, D, seed=seed + 2),
        random(n, OUT, seed=seed + 3),
    )


def gates(n=1, beta=0.7, tau=0.15, **more):
    return Gates(
        *(torch.full((n,), value, dtype=torch.float64) for value in (beta, tau)), **more
    )


def layer(hidden, inputs, duals, weight, outputs, opened):
    mixed = mixing(hidden, inputs, duals, opened)
    with torch.no_grad():
        return add_edit(
            F.linear(hidden, weight), mixed, edit_rows(inputs, weight, outputs)
        )


def close(a, b, tol=1e-12):
    torch.testing.assert_close(a, b, atol=tol * float(b.abs().max() + 1e-300), rtol=0)


def test_the_target_input_gives_the_target_output_as_far_as_the_gate_opens():
    _, i, b, weight, o = setting()
    for opened, share in (
        (gates(), 1 / (1 + math.exp(-2))),
        (gates(normalized=True), 1.0),
    ):
        close(layer(i[None], i, b, weight, o, opened)[0], share * o)


def test_a_zero_encoding_lets_through_what_the_gate_lets_through_at_zero():
    _, i, b, weight, o = setting()
    zero = torch.zeros(1, 1, D).double()
    closed = 1 / (1 + math.exp(0.7 / 0.15))
    assert closed == pytest.approx(0.009316, abs=1e-6)
    close(layer(zero, i, b, weight, o, gates())[0], closed * o)
    assert torch.equal(
        layer(zero, i, b, weight, o, gates(normalized=True)),
        torch.zeros(1, 1, OUT).double(),
    )


def test_a_normalized_gate_never_opens_the_other_way():
    """Below a similarity of 0 it would be negative and add what is to be taken away."""
    away = torch.tensor([[-3.0]]).double()
    assert gates()(away) > 0
    assert gates(normalized=True)(away) == 0


def test_what_is_orthogonal_passes_as_through_the_plain_layer():
    _, i, b, weight, o = setting()
    e = random(2, 5, D, seed=9)
    share = e @ b[0] / (i[0] @ b[0])
    orthogonal = e - share[..., None] * i[0]
    edited = layer(orthogonal, i, b, weight, o, gates(normalized=True))
    close(edited, F.linear(orthogonal, weight))


def test_with_the_similarity_for_a_gate_it_is_the_rank_one_update_of_rome():
    _, i, b, weight, o = setting()
    e = random(2, 5, D, seed=9)
    alike = similarity(e, i, b)
    gated = torch.cat([alike, alike], -1)
    ours = F.linear(e, weight) + gated @ edit_rows(i, weight, o)
    missing = o[0] - weight @ i[0]
    direction = b[0] / (i[0] @ b[0])
    update = torch.outer(missing, direction)
    close(ours, F.linear(e, weight + update))


def test_the_scale_of_the_covariance_does_not_matter():
    factor, i, b, weight, o = setting(2)
    e = random(2, 5, D, seed=9)
    other = dual(factor * math.sqrt(17.3), i)
    scaled = layer(e, i, other, weight, o, gates(2))
    close(scaled, layer(e, i, b, weight, o, gates(2)))


def test_several_concepts_are_taken_out_exactly():
    factor, i, b, _, _ = setting(3)
    e = random(2, 5, D, seed=9)
    rho = mixing(e, i, b, gates(3))[..., :3]
    rest = e - rho @ i
    assert (rest @ b.T).abs().max() < 1e-10
    close(
        mixing(rest, i, b, gates(3))[..., :3] + 1, torch.ones(2, 5, 3).double(), 1e-10
    )
    # the paper's route: whiten with C^-1 = L L^T, orthonormalise, project
    lower = torch.linalg.cholesky(torch.cholesky_inverse(factor))
    basis = torch.linalg.qr((i @ lower).T).Q
    back = torch.linalg.solve(lower.T, basis)
    wanted = e - (e @ torch.cholesky_inverse(factor) @ back) @ back.T
    close(rest, wanted)


def test_one_of_several_reduces_to_the_single_formula_and_order_does_not_matter():
    _, i, b, weight, o = setting(3)
    e = random(2, 5, D, seed=9)
    assert torch.equal(
        mixing(e, i[:1], b[:1], gates()), mixing(e, i[:1], b[:1], gates(exact=False))
    )
    order = torch.tensor([2, 0, 1])
    close(
        layer(e, i[order], b[order], weight, o[order], gates(3)),
        layer(e, i, b, weight, o, gates(3)),
    )


def test_two_concepts_with_one_input_are_no_failure():
    _, i, b, _, _ = setting()
    twice = mixing(i[None], i.repeat(2, 1), b.repeat(2, 1), gates(2))
    assert twice.isfinite().all()
    close(twice[..., :2].sum(-1), torch.ones(1, 1).double(), 1e-8)


def test_ignoring_the_overlap_is_wrong_by_the_overlap():
    _, i, b, _, _ = setting(2)
    exact, ignored = (
        mixing(i[None, :1], i, b, gates(2, exact=flag))[0, 0, :2]
        for flag in (True, False)
    )
    close(exact, torch.tensor([1.0, 0.0]).double(), 1e-10)
    assert ignored[1].abs() > 0.05


def test_a_prompt_out_of_scope_is_not_touched():
    _, i, b, weight, o = setting(2)
    e = random(4, 5, D, seed=9)
    scope = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    mixed = mixing_in_scope(e, i, b, gates(2), scope)
    by_both = mixing(e[:1], i, b, gates(2))
    by_first = mixing(e[1:2], i[:1], b[:1], gates())
    by_second = mixing(e[2:3], i[1:], b[1:], gates())
    of_first, of_second = [0, 2], [1, 3]
    close(mixed[0], by_both[0])
    close(mixed[1][:, of_first], by_first[0])
    close(mixed[2][:, of_second], by_second[0])
    assert not mixed[1][:, of_second].any()
    assert not mixed[3].any()
    plain = F.linear(e, weight)
    with torch.no_grad():
        edited = add_edit(plain.clone(), mixed, edit_rows(i, weight, o))
    assert torch.equal(edited[3], plain[3])
    assert not torch.equal(edited[2], plain[2])


def test_a_larger_beta_opens_less_everywhere():
    alike = torch.linspace(-1, 2, 50)[:, None].double()
    opened = [gates(beta=beta)(alike) for beta in (0.4, 0.6, 0.75)]
    assert (opened[0] > opened[1]).all()
    assert (opened[1] > opened[2]).all()
    assert gates(beta=1e6)(alike).max() == 0


# -- published code --------------------------------------------------------------------------------------------------


def factor_of(matrix):
    return Covariance(matrix.double()).factor()[0]


def replay(tensors, settings, factor, role):
    """Learn as the published code does; check every step; return each concept's (i*, o*)."""
    weight, mix = tensors[f"{role}.W"], settings["frac_gradient_concept_embed"]
    train = Gates(
        torch.tensor([settings["train_beta"]]),
        torch.tensor([settings["train_temperature"]]),
    )
    decay, learned = settings["input_decay"], []
    for concept in range(settings["concepts"]):
        mean = output = None
        for step in range(settings["steps_per_concept"]):
            name = f"concept{concept}.step{step}"
            raw = tensors[f"{name}.text_enc"].clone().requires_grad_()
            hidden = (
                mix * raw + (1 - mix) * raw.detach()
            )  # the reference scales the gradient like this
            rows, places = torch.arange(len(raw)), tensors[f"{name}.positions"]
            seen = hidden[rows, places].mean(0)
            target = F.linear(
                tensors[f"{name}.text_enc_superclass"][rows, places].mean(0), weight
            )
            if mean is None:
                mean, output = seen.detach(), target
            else:
                mean = torch.lerp(seen.detach(), mean, decay)
                output = torch.lerp(target, output, decay) if role == "key" else output
            i = mean + seen - seen.detach()
            output = output.detach().requires_grad_()
            mixed = mixing(hidden, i[None], dual(factor, i)[None], train)
            out = add_edit(
                F.linear(hidden, weight),
                mixed,
                edit_rows(i[None], weight, output[None]),
            )
            yield f"{name}.{role}.out", out.detach()
            upstream = tensors[f"{name}.{role}.upstream_grad"]
            by_text, by_output = torch.autograd.grad(
                (out * upstream).sum(), (raw, output)
            )
            yield f"{name}.{role}.grad_text_enc", by_text
            if role == "value":
                yield f"{name}.{role}.grad_target_output", by_output
                output = output.detach() - 0.05 * by_output / by_output.norm()
            yield f"{name}.{role}.target_output_after", output.detach()
            yield f"{name}.{role}.target_input_after", mean
        learned.append((mean, output.detach()))
    if "eval.text_enc" in tensors:
        hidden = tensors["eval.text_enc"]
        beta, tau = (
            torch.full((2,), settings[f"eval_{key}"]) for key in ("beta", "temperature")
        )
        i, o = (torch.stack(some) for some in zip(*learned, strict=True))
        for concept in range(2):
            one = slice(concept, concept + 1)
            opened = Gates(beta[one], tau[one])
            yield (
                f"eval.concept{concept}.{role}.out",
                layer(hidden, i[one], dual(factor, i[one]), weight, o[one], opened),
            )
        opened = Gates(beta, tau, exact=False)
        yield (
            f"eval.merged.{role}.out_approx",
            layer(hidden, i, dual(factor, i), weight, o, opened),
        )


@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("fixture", ["perfusion_rank1", "perfusion_rank1_shipped_C"])
def test_published_numbers(golden, fixture, role):
    tensors = load_file(golden / f"{fixture}.safetensors")
    said = json.loads((golden / f"{fixture}.json").read_text())
    if fixture.endswith("shipped_C"):
        if not SHIPPED.is_file():
            pytest.skip("the published matrix is not part of the repository")
        factor = factor_of(torch.load(SHIPPED, weights_only=True))
    else:
        factor = factor_of(tensors["C"])
    tolerance = {key: said["tolerance"][key] for key in ("atol", "rtol")}
    checked = []
    for name, value in replay(tensors, said["settings"], factor, role):
        torch.testing.assert_close(
            value, tensors[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
        checked.append(name)
    wanted = {
        n
        for n in tensors
        if f".{role}." in n and "upstream" not in n and "cholesky" not in n
    }
    assert set(checked) == wanted
