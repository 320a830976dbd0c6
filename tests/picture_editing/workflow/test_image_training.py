"""Training MGIE: what is trained and what stays, both losses, and a training that was killed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from mmedit_cli.errors import StateError
from mmedit_cli.hparams import load_hparams
from mmedit_cli.knowledge.training_loop import Conditions
from mmedit_cli.picture_editing.data.base import EditPair
from mmedit_cli.picture_editing.data.opening import open_pairs
from mmedit_cli.picture_editing.methods.base import EditJob, EditSettings
from mmedit_cli.picture_editing.methods.mgie import Mgie
from mmedit_cli.picture_editing.methods.mgie import training as mgie_training
from mmedit_cli.picture_editing.methods.mgie.hparams import MgieHparams
from mmedit_cli.picture_editing.methods.mgie.parts import assemble
from mmedit_cli.picture_editing.methods.mgie.training import (
    MgieTraining,
    dropped,
    train_mgie,
)
from mmedit_cli.picture_editing.methods.shared.latent import encode_pictures, to_pixels
from mmedit_cli.picture_editing.methods.shared.tiny import build
from mmedit_cli.records import Run
from mmedit_cli.runtime import LoadOptions, Processes

CPU = LoadOptions(device="cpu")
TINY = load_hparams(ROOT / "hparams" / "mgie.yaml", MgieHparams, variant="tiny-llava")


@cache
def some_pairs() -> list[EditPair]:
    """A dozen pairs, of two kinds; reading them takes a while, so not when tests are collected."""
    found = open_pairs("emojikb-edits:train")[1][:400]
    return [pair for pair in found if pair.kind in ("background", "turn")][:12]


def hp(train_lm: str = "lora", **training) -> MgieHparams:
    training = {
        "steps": 2,
        "batch_size": 4,
        "micro_batch": 2,
        "validate_every": 100,
        **training,
    }
    return replace(TINY, train_lm=train_lm, training=replace(TINY.training, **training))


def fresh(hparams: MgieHparams) -> Mgie:
    return Mgie(assemble("tiny-llava", hparams, CPU), "tiny-llava", "")


@pytest.fixture
def train(tmp_path):
    """Train an editor in a run folder of its own: `train(hparams)` -> (editor, folder)."""

    def run(
        hparams: MgieHparams, name: str = "run", how: Conditions | None = None
    ) -> tuple[Mgie, object]:
        editor = fresh(hparams)
        with Run.open(tmp_path / name, {}, {}) as opened:
            train_mgie(
                editor,
                hparams,
                some_pairs()[2:],
                some_pairs()[:2],
                opened,
                how or Conditions(),
            )
        return editor, tmp_path / name

    return run


@pytest.fixture
def training(tmp_path):
    """The state of a training that has not begun: `training(hparams)`."""

    def build(hparams: MgieHparams) -> MgieTraining:
        run = Run.open(tmp_path / f"state-{hparams.train_lm}", {}, {})
        state = MgieTraining(fresh(hparams), hparams, run, Conditions(), 0)
        state.prepare(some_pairs(), [])
        return state

    return build


def digests(editor: Mgie) -> dict[str, str]:
    """A digest of each parameter and buffer, by the name it has without LoRA."""
    parts = {
        name: getattr(editor.pipeline, name)
        for name in ("mllm", "edit_head", "unet", "vae")
    }
    return {
        f"{part}.{name.replace('.base_layer', '')}": hashlib.sha256(
            tensor.detach().float().numpy().tobytes()
        ).hexdigest()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


@pytest.mark.parametrize(
    "train_lm",
    [
        "lora",
        "none",
        pytest.param("reference", marks=pytest.mark.slow),
        pytest.param("two_phase", marks=pytest.mark.slow),
    ],
)
def test_only_what_should_change_changes(train, train_lm):
    hparams = hp(train_lm, steps=3)
    before = digests(fresh(hparams))
    editor, folder = train(hparams)
    after = digests(editor)
    changed = {name for name, digest in after.items() if before.get(name) != digest}
    assert not any(name.startswith("vae.") for name in changed)
    of_lm = {name for name in changed if name.startswith("mllm.")}
    matrices = {"mllm.model.language_model.embed_tokens.weight", "mllm.lm_head.weight"}
    if train_lm == "reference":
        assert of_lm == matrices
    elif train_lm == "none":
        assert not of_lm
    else:
        assert of_lm
        assert all("lora_" in name for name in of_lm)
    assert {
        "edit_head.tokens.embed",
        "edit_head.tokens.unembed",
        "edit_head.query",
    } <= changed
    assert all(
        name in changed for name in after if name.startswith("unet.") and "bias" in name
    )
    kept = load_file(folder / "editor.safetensors")
    assert {name.replace(".base_layer", "") for name in kept} >= changed
    assert all(
        ("lora_" in name) or name in matrices
        for name in kept
        if name.startswith("mllm.")
    )


def test_lora_of_the_denoiser(train):
    hparams = replace(hp(), train_unet="lora", unet_lora_rank=4)
    before = digests(fresh(hparams))
    editor, folder = train(hparams)
    after = digests(editor)
    assert all(
        after[name] == digest
        for name, digest in before.items()
        if name.startswith("unet.down_blocks")
    )
    assert after["unet.conv_in.weight"] != before["unet.conv_in.weight"]
    loaded = Mgie.load(str(folder), CPU)
    assert not any("lora" in name for name, _ in loaded.unet.named_parameters())
    assert digests(loaded)[
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    ] not in (before.values())


def test_what_was_trained_loads_and_edits_as_it_did(train):
    editor, folder = train(hp())
    job = EditJob(some_pairs()[0].source(), some_pairs()[0].instruction)
    expected = editor.edit([job], EditSettings(2))[0]
    loaded = Mgie.load(str(folder), CPU)
    got = loaded.edit([job], EditSettings(2))[0]
    assert got.expressive == expected.expressive
    pairs = zip(got.picture.tobytes(), expected.picture.tobytes(), strict=True)
    assert (
        max(abs(a - b) for a, b in pairs) <= 1
    )  # LoRA is folded in: the same up to rounding
    assert (
        loaded.edit([replace(job, expressive="x")], EditSettings(2))[0].picture
        != got.picture
    )


def test_another_base_model_is_refused(train, monkeypatch):
    editor, folder = train(hp(steps=1))
    monkeypatch.setattr("mmedit_cli.catalog.TINY_VERSION", 99)
    Mgie.load(
        str(folder), CPU
    )  # trained from the library: nothing is known of the base
    editor.fingerprint = "another"
    with Run.open(folder, {}, {}) as run:
        state = MgieTraining(fresh(hp(steps=1)), hp(steps=1), run, Conditions(), 0)
        state.editor.fingerprint = "another"
        state._write_result()
    with pytest.raises(StateError, match="is not the model it was trained for"):
        Mgie.load(str(folder), CPU)


def test_a_damaged_checkpoint_is_named(train):
    _, folder = train(hp(steps=1))
    path = folder / "editor.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(StateError, match="not a safetensors file, or cut off"):
        Mgie.load(str(folder), CPU)


# -- losses -----------------------------------------------------------------------------------------------------


def test_who_feels_which_loss(training):
    state = training(hp("reference"))
    samples = [state.sample(pair, i) for i, pair in enumerate(some_pairs()[:3])]
    said, _, edit, _ = state.losses(samples)
    named, one = (
        state.trained,
        torch.autograd.grad(
            said, state.trained.values(), allow_unused=True, retain_graph=True
        ),
    )
    by_said = dict(zip(named, one, strict=True))
    by_edit = dict(
        zip(
            named,
            torch.autograd.grad(edit, named.values(), allow_unused=True),
            strict=True,
        )
    )

    def felt(gradients):
        return {n for n, g in gradients.items() if g is not None and g.abs().sum() > 0}

    assert not [
        n
        for n in felt(by_said)
        if n.startswith(("unet.", "edit_head.")) and ".tokens." not in n
    ]
    assert "mllm.lm_head.weight" in felt(by_said) - felt(by_edit)
    assert "edit_head.tokens.unembed" in felt(by_said) - felt(by_edit)
    assert "mllm.model.language_model.embed_tokens.weight" in felt(by_said) & felt(
        by_edit
    )
    assert "edit_head.tokens.embed" in felt(by_said) & felt(by_edit)
    assert {"edit_head.query", "unet.conv_in.weight"} <= felt(by_edit)


@pytest.mark.parametrize("train_lm", ["none", "two_phase"])
def test_a_frozen_prefix_gives_the_same_losses_and_gradients(
    training, train_lm, monkeypatch
):
    state = training(hp(train_lm, phase=0.0))
    for name, parameter in state.trained.items():
        parameter.requires_grad_(not name.startswith("mllm."))
    wanted = {n: p for n, p in state.trained.items() if p.requires_grad}
    samples = [state.sample(pair, i) for i, pair in enumerate(some_pairs()[:3])]
    found = []
    for frozen in (True, False):
        monkeypatch.setattr(MgieTraining, "frozen_prefix", frozen)
        said, _, edit, _ = state.losses(samples)
        gradients = torch.autograd.grad(said + 0.5 * edit, wanted.values())
        found.append((said.detach(), edit.detach(), *gradients))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-3)


@torch.no_grad()
def test_the_instruction_loss_by_hand(training):
    state = training(hp())
    samples = [state.sample(pair, i) for i, pair in enumerate(some_pairs()[:2])]
    said, count, *_ = state.losses(samples)
    guide, total, n = state.guide, 0.0, 0
    for s in samples:
        (row,) = guide.rows(guide.features([s.source]), [s.instruction], [s.expressive])
        hidden = guide.states([row]).hidden[0]
        v = guide.n_vocabulary
        sequence = [*row.ids.tolist(), *range(v, v + 8), guide.tokenizer.eos_token_id]
        logs = guide.logits(hidden).log_softmax(-1)
        for place in range(row.n_prompt - 1, len(sequence) - 1):
            total, n = total - float(logs[place, sequence[place + 1]]), n + 1
    assert count == n == state._n_labels(some_pairs()[:2])
    assert float(said) == pytest.approx(total, rel=1e-4)


@torch.no_grad()
def test_the_edit_loss_by_hand(training):
    state = training(hp())
    pair, editor = some_pairs()[0], state.editor
    s = replace(state.sample(pair, 0), u=0.99)
    got = float(state.losses([s])[2])
    source = editor.vae.encode(to_pixels([s.source])).latent_dist.mean
    moments = editor.vae.encode(to_pixels([s.target])).latent_dist
    latents = (moments.mean + moments.std * s.spread) * editor.vae.config.scaling_factor
    t = int(s.t * 1000)
    a = state.noise_scheduler.alphas_cumprod[t]
    noisy = a.sqrt() * latents + (1 - a).sqrt() * s.noise
    (row,) = state.guide.rows(
        state.guide.features([s.source]), [s.instruction], [s.expressive]
    )
    condition = editor.edit_head(state.guide.states([row]).visual)
    predicted = editor.unet(
        torch.cat([noisy, source], 1), t, encoder_hidden_states=condition
    ).sample
    assert got == pytest.approx(float((predicted - s.noise).square().mean()), rel=1e-4)
    assert torch.equal(encode_pictures(editor.vae, [s.source]), source)


def test_the_head_is_drawn_to_the_text_encoder_and_the_denoiser_is_not_run(train):
    hparams = replace(
        hp(steps=40, edit_weight=0.0, align_weight=1.0, learning_rate=1e-2),
        train_unet="none",
    )
    before = digests(fresh(hparams))
    editor, folder = train(hparams)
    log = [
        json.loads(line)["losses"]
        for line in (folder / "log.jsonl").read_text().splitlines()
        if "losses" in line
    ]
    assert log[-1]["align"] < 0.7 * log[0]["align"]
    assert {line["edit"] for line in log} == {0.0}
    after = digests(editor)
    assert all(
        after[name] == digest
        for name, digest in before.items()
        if name.startswith("unet.")
    )
    assert not any(
        name.startswith("unet.") for name in load_file(folder / "editor.safetensors")
    )


@torch.no_grad()
def test_the_distance_to_the_text_encodings_by_hand(training):
    state = training(hp(align_weight=0.5))
    samples = [state.sample(pair, i) for i, pair in enumerate(some_pairs()[:2])]
    got = float(state.losses(samples).align)
    pipeline = build("tiny-ip2p")
    head, texts = (
        state.editor.edit_head,
        [some_pairs()[0].instruction, some_pairs()[1].instruction, ""],
    )
    ids = pipeline.tokenizer(texts, padding="max_length", return_tensors="pt")[
        "input_ids"
    ]
    wanted = pipeline.text_encoder(ids)[0]
    guide = state.guide
    rows = guide.rows(
        guide.features([s.source for s in samples]),
        texts[:2],
        [s.expressive for s in samples],
    )
    found = torch.cat([head(guide.states(rows).visual), head.null(1)])
    assert got == pytest.approx(
        float((found - wanted).square().mean() / wanted[2].var()), rel=1e-4
    )


def test_edited_pictures_are_not_opened_where_the_denoiser_is_not_run(training):
    state = training(hp(edit_weight=0.0, align_weight=1.0))
    state.losses(
        [
            state.sample(
                replace(some_pairs()[0], target=lambda: pytest.fail("opened")), 0
            )
        ]
    )


def test_both_weights_cannot_be_nothing():
    with pytest.raises(ValueError, match="not both be 0"):
        hp(edit_weight=0.0)


def test_what_is_dropped_gets_the_null_condition_and_no_picture(training):
    state = training(hp())
    seen = []
    handle = state.editor.unet.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append(
            (args[0], kwargs["encoder_hidden_states"])
        ),
        with_kwargs=True,
    )
    base = state.sample(some_pairs()[0], 0)
    state.losses([replace(base, u=u) for u in (0.01, 0.07, 0.12, 0.5)])
    handle.remove()
    ((inputs, conditions),) = seen
    null = state.editor.edit_head.null(1)[0]
    assert [torch.allclose(c, null, atol=1e-6) for c in conditions] == [
        True,
        True,
        False,
        False,
    ]
    assert [bool((row[4:] == 0).all()) for row in inputs] == [False, True, True, False]


def test_the_law_of_dropping():
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    text, picture = dropped(u, 0.05)
    for share, wanted in (
        ((text & ~picture), 0.05),
        ((text & picture), 0.05),
        ((~text & picture), 0.05),
    ):
        assert share.float().mean() == pytest.approx(wanted, abs=0.006)
    both = (u >= 0.05) & (u < 0.10)
    assert torch.equal(text & picture, both)


def test_pairs_are_mirrored_together_unless_a_side_is_named(training):
    state = training(hp(flip=1.0))
    plain = state.sample(some_pairs()[0], 3, by_chance=False)
    mirrored = state.sample(some_pairs()[0], 3)
    from PIL import ImageOps

    assert mirrored.source == ImageOps.mirror(plain.source)
    assert mirrored.target == ImageOps.mirror(plain.target)
    assert torch.equal(mirrored.noise, plain.noise)
    sided = replace(some_pairs()[0], instruction="move it to the left")
    assert state.sample(sided, 3).source == plain.source


# -- steps ------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "train_lm", ["lora", pytest.param("two_phase", marks=pytest.mark.slow)]
)
def test_a_killed_training_ends_with_the_same_bits(
    train, tmp_path, monkeypatch, train_lm
):
    monkeypatch.setattr(mgie_training, "SAVE_SECONDS", 0.0)
    hparams = hp(train_lm, steps=4, ema=0.9)
    _, whole = train(hparams, "whole")
    ticks = iter(range(100))

    def kill(what: str, n: int) -> None:
        if what == "steps" and next(ticks) == 3:
            raise Killed

    with pytest.raises(Killed):
        train(hparams, "torn", Conditions(tick=kill))
    assert not (tmp_path / "torn" / "editor.safetensors").exists()
    _, torn = train(hparams, "torn")
    one, other = (load_file(folder / "editor.safetensors") for folder in (whole, torn))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    lines = [
        [json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()]
        for f in (whole, torn)
    ]
    assert lines[0] == lines[1]


def test_micro_batches_and_processes_add_up(training, monkeypatch):
    gradients = []
    for micro, world in ((4, 1), (2, 1), (1, 2)):
        sums: dict[str, torch.Tensor] = {}
        for rank in range(world):
            state = training(hp(micro_batch=micro, clip=None))
            state.processes = Processes(rank, world)
            monkeypatch.setattr(state, "_add_gradients", lambda: None)
            monkeypatch.setattr(state.optimizer, "step", lambda: None)
            monkeypatch.setattr(state.optimizer, "zero_grad", lambda: None)
            state._step()
            for name, parameter in state.trained.items():
                if parameter.grad is not None:
                    sums[name] = sums.get(name, 0) + parameter.grad
            state.run.close()
        gradients.append(sums)
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for name, gradient in other.items():
            torch.testing.assert_close(
                gradient, gradients[0][name], atol=1e-6, rtol=1e-3
            )


def test_the_running_mean_is_what_is_kept(train):
    _editor, folder = train(hp(steps=3, ema=0.9))
    kept = load_file(folder / "editor.safetensors")
    last = load_file(folder / "last.safetensors")
    name = "unet.conv_out.bias"
    assert torch.equal(kept[name], last[f"mean.{name}"])
    assert not torch.equal(kept[name], last[f"trained.{name}"])
    assert torch.equal(kept["edit_head.query"], last["trained.edit_head.query"])


@pytest.mark.parametrize(
    "train_lm", ["lora", pytest.param("reference", marks=pytest.mark.slow)]
)
def test_a_small_set_is_learned(train, train_lm, monkeypatch):
    rates = {
        "learning_rate": 4e-2,
        "unet_learning_rate": 1e-3,
        "warmup": 5,
        "drop": 0.0,
        "flip": 0.0,
    }
    hparams = replace(
        hp(train_lm, steps=40, batch_size=2, validate_every=100, **rates),
        expressive="instruction",
    )
    monkeypatch.setattr(mgie_training, "LOG_EVERY", 1)
    editor = fresh(hparams)
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder, Run.open(ROOT / folder, {}, {}) as run:
        report = train_mgie(editor, hparams, some_pairs()[:2], [], run, Conditions())
    losses = [line["losses"]["instruction"] for line in report["losses"]]
    assert losses[-1] < 0.4 * losses[0]


def test_bfloat16(tmp_path):
    hparams = hp("lora", steps=2)
    editor = Mgie(
        assemble("tiny-llava", hparams, LoadOptions(device="cpu", dtype="bfloat16")),
        "tiny-llava",
        "",
    )
    with Run.open(tmp_path / "run", {}, {}) as run:
        report = train_mgie(
            editor, hparams, some_pairs()[2:6], some_pairs()[:1], run, Conditions()
        )
    assert report["losses"]
    kept = load_file(tmp_path / "run" / "editor.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in kept.values())
    loaded = Mgie.load(
        str(tmp_path / "run"), LoadOptions(device="cpu", dtype="bfloat16")
    )
    assert loaded.edit([EditJob(some_pairs()[0].source(), "a")], EditSettings(1))[
        0
    ].picture.size == (
        64,
        64,
    )


# -- command ----------------------------------------------------------------------------------------------------


def test_the_command(cli, tmp_path):
    small = (
        "--model",
        "tiny-llava",
        "--set",
        "training.steps=2",
        "--set",
        "expressive=instruction",
        "--limit",
        "8",
    )
    words = (
        "train-editor",
        "mgie",
        *small,
        "--validation",
        "emojikb-edits:val",
        "--device",
        "cpu",
    )
    code, out, err = cli(*words, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["steps"] == 2
    assert report["curve"][-1]["step"] == 2
    assert "already done" in cli(*words)[2]
    made = tmp_path / "o.png"
    picture = ROOT / "data" / "emojikb" / "noto" / "1f34e.png"
    code, out, err = cli(
        "image-edit",
        "mgie",
        "-i",
        picture,
        "paint it",
        "-o",
        made,
        "--steps",
        1,
        "--show-instruction",
        "--device",
        "cpu",
        "--checkpoint",
        "latest",
    )
    assert code == 0, err
    assert report["run"] in err
    assert f"networks: run {report['run'].rpartition('/')[2]}, trained 2 steps" in err
    assert made.is_file()
    assert "(model)" in out or "(fallback)" in out
    assert "mgie" in cli("report")[1]
    other = tmp_path / "other.png"
    code, _, err = cli(
        "image-edit",
        "mgie",
        "-i",
        picture,
        "x",
        "-o",
        other,
        "--checkpoint",
        "abcd1234",
    )
    assert (code, report["run"].rpartition("/")[2] in err) == (2, True)
    both = ("--checkpoint", "latest", "--model", "tiny-mgie")
    assert cli("image-edit", "mgie", "-i", picture, "x", "-o", other, *both)[0] == 2
    assert (
        cli(
            "image-edit", "instruct-pix2pix", "-i", picture, "x", "-o", other, *both[:2]
        )[0]
        == 2
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("instruct-pix2pix",), "is not trained here"),
        (("mgie", "--data", "nowhere"), "no edit pairs there"),
        (("mgie", "--data", "emojikb-edits:trian"), "did you mean train"),
        (
            (
                "mgie",
                "--set",
                "training.batch_size=3",
                "--set",
                "training.micro_batch=2",
            ),
            "multiple of micro_batch",
        ),
        (
            (
                "mgie",
                "--model",
                "tiny-blip2",
                "--set",
                "diffusion=tiny-ip2p",
                "--limit",
                "8",
            ),
            "mgie is built on llava",
        ),
    ],
)
def test_wrong_input_is_one_line(cli, words, said):
    default = () if "--model" in words else ("--model", "tiny-llava")
    code, _, err = cli("train-editor", *words, *default, "--device", "cpu")
    assert code == 2, err
    assert said in err
