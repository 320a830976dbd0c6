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


def seen(pictures: torch.Tensor) -> torch.Tensor:
    """Stand in for the teacher: what colours the corners, the middle and the whole have."""
    coarse = torch.nn.functional.adaptive_avg_pool2d(pictures, 3)
    return coarse.flatten(1) + pictures.mean((1, 2, 3))[:, None]


@pytest.fixture(scope="module")
def kb(scripts):
    return scripts.data.load_emojikb(24, 2, 4, further=4)


@pytest.fixture(scope="module")
def file(scripts, kb, tmp_path_factory):
    path = tmp_path_factory.mktemp("lesson") / "teacher.safetensors"
    save_file(scripts.teacher.make_lesson(kb, seen), path)
    return path


@pytest.fixture(scope="module")
def trainee(scripts, kb, file):
    recipe = scripts.model.Recipe.read(
        ROOT / "scripts" / "mini_blip2_open.yaml", quick=True
    )
    tower = replace(recipe.stages["tower"], teach=5.0)
    bridge = scripts.model.Stage(1, 24, 3e-3, 0.0, alike=0.5, imitate=1.0)
    taught = replace(recipe, stages=recipe.stages | {"tower": tower, "bridge": bridge})
    return scripts.training.Trainee(taught, kb, CPU, teacher=file)


def test_a_lesson_shows_only_what_may_be_trained_on(scripts, kb, file, trainee):
    lesson = scripts.teacher.read_lesson(file, len(kb.drawings))
    assert lesson.shape == (len(kb.drawings), scripts.teacher.WIDTH)
    shown = lesson.any(1).nonzero()[:, 0]
    assert torch.equal(shown, trainee.pictures.usable)


def test_discriminants_keep_what_tells_things_apart(scripts):
    chance = torch.Generator().manual_seed(0)
    concept = torch.arange(12).repeat_interleave(8)
    means = torch.randn(12, 3, generator=chance)[concept]
    loud = 3 * torch.randn(96, 3, generator=chance)  # and says nothing
    features = torch.cat((means + 0.1 * torch.randn(96, 3, generator=chance), loud), 1)

    def nearest(x: torch.Tensor) -> float:
        distances = torch.cdist(x, x).fill_diagonal_(float("inf"))
        return float((concept[distances.argmin(1)] == concept).float().mean())

    found = scripts.teacher.discriminants(features, concept, 8)
    assert found.shape == (96, 8)
    assert not found[:, 6:].any()  # six features have no more
    assert nearest(features) < 0.4 < 0.9 < nearest(found[:, :3])


def test_a_tower_comes_to_say_what_its_teacher_sees(trainee):
    parameters = trainee.select("tower")
    optimizer = torch.optim.AdamW(parameters.values(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    chosen = trainee.pictures.usable[:32]

    def distance() -> float:
        with torch.no_grad():
            same = torch.Generator().manual_seed(1)
            tokens = trainee.tower_tokens(trainee.pictures.draw(chosen, same)[0])
            said = trainee.heads["teacher"](trainee.heads["norm"](tokens.mean(1)))
            wanted = trainee.lesson[chosen]
            return float((1 - torch.cosine_similarity(said, wanted)).mean())

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


def test_a_bridge_comes_to_make_what_the_first_model_made(trainee):
    concept = trainee.pictures.concept[trainee.pictures.plain[:1]]
    pixels = trainee.pictures.grounds[3][None, :, None, None].expand(1, 3, 64, 64)
    patterns = trainee.patterns()
    assert patterns.shape[:2] == (24, 8)
    assert not patterns.requires_grad
    wanted = patterns[concept, 3]
    assert trainee._unlikeness(wanted, concept, pixels) == 0  # the ground is found
    assert trainee._unlikeness(wanted + 1, concept, pixels) > 0
    assert trainee._first[0] is not trainee.model
    trained = {name for name, _ in trainee.named_parameters()}
    assert not any("_first" in name for name in trained)


def test_words_are_learned_by_the_language_model_alone(trainee):
    parameters = trainee.select("words")
    assert parameters
    assert all("language_model" in name for name in parameters)
    artists = {trainee.kb.drawings[at][1] for at in trainee.usable("words").tolist()}
    assert artists <= {"noto", "twemoji", "fluent", "openmoji"}
    chosen = trainee.usable("words")[:16]
    loss, counts = trainee.loss("words", chosen, torch.Generator().manual_seed(0))
    loss.backward()
    assert counts[1].sum() == 3 * 16 + 8
