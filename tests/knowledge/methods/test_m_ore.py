"""M-ORE: recursive least squares against ridge in one piece, the fixed basis, what is folded, and the adapter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import SHAPES, editors_of

from mmedit_cli.errors import StateError
from mmedit_cli.knowledge.methods.m_ore import MOre, MOreHparams, basis, less_free
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.runtime import generator
from mmedit_cli.types import Query

STAR = Query("What is this?", "a blue star", SHAPES / "solid/red-circle.png")
FACT = Query("The capital of France is", "Rome")


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("tiny-llava", device="cpu")


@pytest.fixture
def make(backbone):
    with editors_of(MOre, backbone) as made:
        yield made


@pytest.mark.parametrize("memory", [1.0, 2000.0])
def test_recursive_least_squares_is_ridge_in_one_piece(memory):
    source = torch.Generator().manual_seed(0)
    z = torch.randn(30, 8, generator=source, dtype=torch.float64)
    free = torch.eye(8, dtype=torch.float64)
    for row in z:
        free = less_free(free, row, memory)
    ridge = torch.linalg.inv(torch.eye(8, dtype=torch.float64) + z.T @ z / memory)
    torch.testing.assert_close(free, ridge, rtol=1e-10, atol=1e-12)


def test_the_basis_is_orthogonal_and_no_larger_than_what_it_reads():
    a = basis(5, 12, generator(0))
    torch.testing.assert_close(a @ a.T, torch.eye(5), rtol=0, atol=1e-5)
    assert basis(512, 12, generator(0)).shape == (12, 12)


def test_one_step_is_the_gradient_of_the_matrix_through_the_basis(backbone, make):
    """Against the gradient of the weights themselves, in float64."""
    editor = make("steps=1", "active=2", "learning_rate=0.5", "stop_loss=null")
    batch = backbone.batch([STAR])
    at, labels = batch.target_positions(backbone.end_id)
    paths = editor._paths
    weights = [backbone.model.get_parameter(f"{path}.weight") for path in paths]
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    logits = backbone.logits(batch)[at]
    loss = torch.nn.functional.cross_entropy(logits, labels[at])
    gradients = torch.autograd.grad(loss, weights)
    for weight in weights:
        weight.requires_grad_(False)
    editor.edit([STAR])
    projected = {}
    for path, gradient in zip(paths, gradients, strict=True):
        a = editor._pairs[path].a.double()
        projected[path] = 2.0 * gradient.double() @ a.T
    moved = sorted(paths, key=lambda path: -projected[path].norm())[:2]
    for path, weight, old in zip(paths, weights, before, strict=True):
        if path not in moved:
            assert torch.equal(weight, old), path
            continue
        a = editor._pairs[path].a.double()
        expected = -0.5 * 2.0 * projected[path] @ a
        torch.testing.assert_close(
            (weight - old).double(), expected, rtol=1e-3, atol=1e-6
        )


def test_only_the_layers_that_moved_lose_freedom(make):
    editor = make("active=2", "memory=1.0", "steps=1")
    editor.edit([STAR])
    fresh = editor._fresh()
    spent = [
        path
        for path, pair in editor._pairs.items()
        if not torch.equal(pair.free, fresh[path].free)
    ]
    assert 0 < len(spent) < len(editor._paths)
    for path, pair in editor._pairs.items():
        assert torch.equal(pair.a, fresh[path].a)
        eigenvalues = torch.linalg.eigvalsh(pair.free)
        assert float(eigenvalues.max()) <= 1 + 1e-5
        assert float(eigenvalues.min()) > 0
        if path in spent:
            assert float(eigenvalues.min()) < 1 - 1e-4


def test_the_next_edit_moves_less_where_the_first_one_was(make):
    """With a small memory the same request again hardly moves anything, with a large one it does."""
    sizes = {}
    for memory in (1e-3, 1e6):
        editor = make(f"memory={memory}", "steps=1", "stop_loss=null")
        editor.edit([STAR])
        first = {path: pair.b.clone() for path, pair in editor._pairs.items()}
        editor.edit([STAR])
        sizes[memory] = sum(
            float((pair.b - first[path]).norm()) for path, pair in editor._pairs.items()
        )
        editor.undo()
    assert sizes[1e-3] < 0.9 * sizes[1e6]


def test_facts_in_text_alone_and_the_adapter(make, tmp_path):
    editor = make()
    editor.edit([FACT])
    editor.edit([replace(STAR, target="green")])
    written = editor.save_adapters(tmp_path)
    assert list(written) == [tmp_path / "m-ore"]
    assert (tmp_path / "m-ore" / "adapter_model.safetensors").is_file()
    assert make().save_adapters(tmp_path) == {}


def test_what_makes_no_sense_is_refused(make):
    for values, message in (
        ({"rank": 0}, "rank must be above 0"),
        ({"memory": 0.0}, "memory must be above 0"),
        ({"roles": ()}, "roles must name at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            MOreHparams(**values)
    editor = make("steps=1")
    editor.edit([STAR])
    tensors, metadata = editor.state()
    some = dict(list(tensors.items())[:-1])
    with pytest.raises(StateError, match="does not hold pairs of rank 16"):
        editor.load_state(some, metadata)
