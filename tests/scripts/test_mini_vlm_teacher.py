"""A tower is taught by what another network sees in the same pictures, and what reads it by blends of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import ROOT, imported_scripts
from safetensors.torch import save_file

from mmedit_cli import runtime

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
VIEWS = 2


@pytest.fixture(scope="module")
def scripts():
    with imported_scripts(
        data="mini_vlm_data",
        model="mini_vlm_model",
        teacher="mini_vlm_teacher",
        training="mini_vlm_training",
    ) as modules:
        runtime.quiet_libraries()
        yield modules


def seen_by(width: int):
    """Return a teacher that sees the mean colours, repeated to its width."""

    def teacher(pictures: torch.Tensor) -> torch.Tensor:
        colours = pictures.mean((2, 3))
        return colours.repeat(1, width // 3 + 1)[:, :width]

    return teacher


@pytest.fixture(scope="module")
def kb(scripts):
    return scripts.data.load_emojikb(24, 2, 4, further=4)


@pytest.fixture(scope="module")
def file(scripts, kb, tmp_path_factory):
    teacher = seen_by(scripts.teacher.WIDTH)
    path = tmp_path_factory.mktemp("lesson") / "teacher.safetensors"
    save_file(scripts.teacher.make_lesson(kb, teacher, VIEWS, seed=1), path)
    return path


@pytest.fixture(scope="module")
def trainee(scripts, kb, file):
    recipe = scripts.model.Recipe.read(
        ROOT / "scripts" / "mini_blip2_open.yaml", quick=True
    )
    tower = replace(recipe.stages["tower"], teach=5.0)
    bridge = scripts.model.Stage(1, 24, 3e-3, 0.0, alike=0.5)
    taught = replace(recipe, stages=recipe.stages | {"tower": tower, "bridge": bridge})
    return scripts.training.Trainee(taught, kb, CPU, teacher=file)


def test_a_lesson_shows_only_what_may_be_trained_on(scripts, kb, file, trainee):
    lesson = scripts.teacher.read_lesson(file, len(kb.drawings))
    shown = (lesson.row_of >= 0).nonzero()[:, 0]
    assert torch.equal(shown, trainee.pictures.usable)
    assert lesson.views.shape[:2] == (len(shown), VIEWS)


def test_each_view_comes_with_what_was_seen_in_it(scripts, kb, file):
    lesson = scripts.teacher.read_lesson(file, len(kb.drawings))
    shown = (lesson.row_of >= 0).nonzero()[:, 0]
    chosen = shown[:9]
    chance = torch.Generator().manual_seed(0)
    views, _, seen = lesson.draw(chosen, chance)
    red = views[:, 0].mean((1, 2))
    order = red.argsort()
    assert torch.equal(seen[:, 0].argsort(), order)  # standardising keeps the order
    assert torch.allclose(seen[:, 0], seen[:, 3], atol=1e-2)


def test_a_tower_comes_to_say_what_its_teacher_sees(trainee):
    parameters = trainee.select("tower")
    optimizer = torch.optim.AdamW(parameters.values(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    chosen = trainee.pictures.usable[:32]

    def distance() -> float:
        with torch.no_grad():
            pixels, _, seen = trainee.lesson.draw(
                chosen, torch.Generator().manual_seed(1)
            )
            tokens = trainee.tower_tokens(pixels).mean(1)
            said = trainee.heads["teacher"](trainee.heads["norm"](tokens))
            return float((1 - torch.cosine_similarity(said, seen)).mean())

    before = distance()
    for _ in range(25):
        loss, _ = trainee.loss("tower", chosen, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert distance() < 0.7 * before


def test_blending_mixes_pictures_and_ends_with_its_stage(trainee):
    pixels = 255 * torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain = trainee.tower_tokens(pixels)
        with trainee.blending(0.5, torch.Generator().manual_seed(3)):
            mixed = trainee.tower_tokens(pixels)
        after = trainee.tower_tokens(pixels)
    assert torch.equal(plain, after)
    moved = (mixed - plain).flatten(1).norm(dim=1)
    assert (moved > 0).sum() >= 4  # a picture may be given to itself
    others = torch.cdist(plain.flatten(1), plain.flatten(1)).amax(1)
    assert (moved <= 0.5 * others + 1e-4).all()


def test_a_bridge_learns_to_let_names_through_alone(trainee):
    parameters = trainee.select("bridge")
    trained = {name.split(".")[0] for name in parameters}
    assert trained == {"model", "readers"}
    assert not any("vision_model" in n or "language_model" in n for n in parameters)
    before = {name: p.clone() for name, p in trainee.named_parameters()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    chosen = trainee.pictures.usable[:24]
    losses = []
    for _ in range(12):
        loss, counts = trainee.loss("bridge", chosen, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert counts[1, 0] == 2 * len(chosen)  # each with another artist's drawing
    moved = {n for n, p in trainee.named_parameters() if not torch.equal(p, before[n])}
    assert moved <= set(parameters)
