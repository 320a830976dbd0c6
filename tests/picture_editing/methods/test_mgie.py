"""MGIE: the edit head against published numbers, the guide against step-by-step generation, the editor as a whole."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import DynamicCache

from mmedit_cli.errors import DataError, ModelError, UserError
from mmedit_cli.picture_editing.methods.base import EditJob, EditSettings
from mmedit_cli.picture_editing.methods.mgie import Mgie
from mmedit_cli.picture_editing.methods.mgie.guide import IGNORE, cache_argument, clean
from mmedit_cli.picture_editing.methods.mgie.modules import (
    MGIEEditHead,
    VisualTokens,
    widened,
)
from mmedit_cli.picture_editing.methods.mgie.pipeline import MGIEPipeline
from mmedit_cli.picture_editing.methods.shared import tiny
from mmedit_cli.picture_editing.methods.shared.latent import to_pictures
from mmedit_cli.runtime import LoadOptions

CPU = LoadOptions(device="cpu")


def picture(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    values = torch.rand(
        1, 3, height, width, generator=torch.Generator().manual_seed(seed)
    )
    return to_pictures(values * 2 - 1)[0]


@pytest.fixture(scope="module")
def editor() -> Mgie:
    return Mgie.load("tiny-mgie", CPU)


# -- edit head --------------------------------------------------------------------------------------------------


def test_published_edit_head(golden):
    tensors = load_file(golden / "mgie_edit_head.safetensors")
    about = json.loads((golden / "mgie_edit_head.json").read_text())
    s, limits = about["settings"], {k: about["tolerance"][k] for k in ("atol", "rtol")}
    head = MGIEEditHead(
        s["llm"],
        s["hidden"],
        s["queries"],
        s["out"],
        s["encoder_layers"],
        s["heads"],
        s["feed_forward"],
    )
    weights = {
        k.removeprefix("weights."): v
        for k, v in tensors.items()
        if k.startswith("weights.")
    }
    missing = head.load_state_dict(weights, strict=False)
    assert sorted(missing.missing_keys) == ["tokens.embed", "tokens.unembed"]
    assert not missing.unexpected_keys
    for i in range(len(s["cases"])):
        case = {
            k.removeprefix(f"case{i}."): v
            for k, v in tensors.items()
            if k.startswith(f"case{i}.")
        }
        head.tokens.embed = nn.Parameter(case["embeddings"])
        hidden = case["hidden"].requires_grad_()
        out = head(hidden)
        torch.testing.assert_close(out, case["out"], **limits)
        out.backward(case["upstream_grad"])
        torch.testing.assert_close(hidden.grad, case["grad_hidden"], **limits)


def test_the_reference_size():
    with torch.device("meta"):
        head = MGIEEditHead()
    own = sum(
        p.numel()
        for name, p in head.named_parameters()
        if not name.startswith("tokens.")
    )
    assert own == 31_958_784
    assert head(torch.zeros(2, 8, 4096, device="meta")).shape == (2, 77, 768)


@torch.no_grad()
def test_the_order_of_pairs_does_not_matter_and_that_of_states_does(editor):
    head, states = (
        editor.edit_head,
        torch.randn(2, 8, 48, generator=torch.Generator().manual_seed(1)),
    )
    order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    before, embed = head(states), head.tokens.embed.clone()
    assert not torch.allclose(head(states[:, order]), before, atol=1e-3)
    head.tokens.embed.copy_(embed[order])
    torch.testing.assert_close(head(states[:, order]), before, atol=1e-5, rtol=1e-5)
    head.tokens.embed.copy_(embed)
    torch.testing.assert_close(head.null(3), head(torch.zeros(3, 8, 48)))


def test_widening_changes_nothing():
    four = tiny.unet(4)
    eight = tiny.unet(4)
    eight.load_state_dict(four.state_dict())
    eight.conv_in = widened(eight.conv_in, 8)
    assert torch.equal(eight.conv_in.bias, four.conv_in.bias)
    latents, context = torch.randn(1, 4, 16, 16), torch.randn(1, 5, 32)
    old = four(latents, 10, encoder_hidden_states=context).sample
    for v in (torch.zeros_like(latents), torch.randn_like(latents)):
        new = eight(
            torch.cat([latents, v], 1), 10, encoder_hidden_states=context
        ).sample
        torch.testing.assert_close(new, old, atol=1e-6, rtol=1e-6)


def test_a_text_to_image_model_to_start_from(tmp_path):
    from diffusers import StableDiffusionPipeline

    from mmedit_cli.picture_editing.methods.mgie.hparams import MgieHparams
    from mmedit_cli.picture_editing.methods.mgie.parts import assemble

    drawing = StableDiffusionPipeline(
        vae=tiny.vae(),
        text_encoder=tiny.text_encoder(),
        tokenizer=tiny.clip_tokenizer(),
        unet=tiny.unet(4),
        scheduler=tiny.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    drawing.save_pretrained(tmp_path / "sd")
    pipeline = assemble(
        "tiny-llava",
        MgieHparams(str(tmp_path / "sd"), d_model=32, heads=2, layers=1),
        CPU,
    )
    assert (
        pipeline.unet.config.in_channels == pipeline.unet.conv_in.weight.shape[1] == 8
    )
    assert not pipeline.unet.conv_in.weight[:, 4:].any()
    assert Mgie(pipeline, "", "").edit(
        [EditJob(picture(), "paint it blue")], EditSettings(1)
    )[0].picture.size == (32, 32)


# -- guide ------------------------------------------------------------------------------------------------------


def rows_of(guide, texts, instructions=("paint it blue",)):
    features = guide.features([picture(seed=i) for i in range(len(texts))])
    return guide.rows(
        features,
        [instructions[i % len(instructions)] for i in range(len(texts))],
        texts,
    )


TEXTS = ["", "a star", "a red circle in a green house under the moon " * 3]


@torch.no_grad()
def test_states_are_those_of_step_by_step_generation(editor):
    guide = editor.guide
    stack = guide.mllm.get_decoder()
    for row in rows_of(guide, TEXTS):
        cache, found = {cache_argument(stack): DynamicCache(config=stack.config)}, []
        for vector in [*row.embeddings, *guide.tokens.embed]:
            out = stack(inputs_embeds=vector[None, None], use_cache=True, **cache)
            found.append(out.last_hidden_state[0, 0])
        states = guide.states([row])
        assert states.visual.shape == (1, 8, 48)
        expected = torch.stack(found)
        torch.testing.assert_close(states.hidden[0], expected, atol=1e-5, rtol=1e-4)
        q = len(row.ids)  # where IMG0 stands
        torch.testing.assert_close(
            states.visual[0], expected[q - 1 : q + 7], atol=1e-5, rtol=1e-4
        )


@torch.no_grad()
def test_a_padded_batch_and_a_frozen_prefix_give_the_same(editor):
    guide = editor.guide
    rows = rows_of(guide, TEXTS, ("paint it blue", "what?"))
    together = guide.states(rows)
    for i, row in enumerate(rows):
        torch.testing.assert_close(
            together.visual[i], guide.states([row]).visual[0], atol=1e-5, rtol=1e-4
        )
    cached = guide.states(rows, frozen_prefix=True)
    real = together.mask.bool()
    torch.testing.assert_close(
        cached.hidden[real], together.hidden[real], atol=1e-5, rtol=1e-4
    )


def test_labels_stand_where_the_next_token_is_predicted(editor):
    guide = editor.guide
    rows = rows_of(guide, TEXTS)
    labels = guide.labels(rows)
    for row, line in zip(rows, labels.tolist(), strict=True):
        said = row.ids[row.n_prompt :].tolist()
        v = guide.n_vocabulary
        assert [x for x in line if x != IGNORE] == [
            *said,
            *range(v, v + 8),
            guide.tokenizer.eos_token_id,
        ]
        assert all(x != IGNORE for x in line[-9 - len(said) :])
    only = guide.labels(rows, visual_only=True)
    assert (only != IGNORE).sum(1).tolist() == [9, 9, 9]
    assert len(rows[0].ids) == rows[0].n_prompt  # nothing was said


@torch.no_grad()
def test_writing_is_greedy_over_the_vocabulary_with_the_visual_tokens(editor):
    guide = editor.guide
    (written,) = guide.write([picture()], ["paint it blue"], longest=5)
    (row,) = rows_of(guide, [None])
    said, embeddings = [], row.embeddings
    for _ in range(5):
        hidden = guide.mllm.get_decoder()(
            inputs_embeds=embeddings[None]
        ).last_hidden_state[0, -1]
        logits = guide.logits(hidden)
        logits[
            [guide._image_id, *range(guide.n_vocabulary + 1, guide.n_vocabulary + 8)]
        ] = -torch.inf
        token = int(logits.argmax())
        if token in (guide.tokenizer.eos_token_id, guide.n_vocabulary):
            break
        said.append(token)
        embeddings = torch.cat(
            [embeddings, guide.mllm.get_input_embeddings()(torch.tensor([token]))]
        )
    assert written.text == clean(guide.tokenizer.decode(said, skip_special_tokens=True))
    assert written.source == "model"
    assert written.warnings


@torch.no_grad()
def test_img0_ends_the_text_and_silence_is_the_instruction(editor):
    guide = editor.guide
    before = guide.tokens.unembed.clone()
    (row,) = rows_of(guide, [None])
    hidden = guide.states([row]).hidden[0, len(row.ids) - 1]
    guide.tokens.unembed[0] = hidden * 100  # IMG0 is what comes first
    (written,) = guide.write([picture()], ["paint it blue"])
    guide.tokens.unembed.copy_(before)
    assert (written.text, written.source) == ("paint it blue", "fallback")
    assert written.warnings
    assert not guide.mllm.get_output_embeddings()._forward_hooks


@torch.no_grad()
def test_writing_in_company_is_writing_alone(editor):
    texts, pictures = (
        ["paint it blue", "what", "make it a house by the lake"],
        [picture(seed=i) for i in range(3)],
    )
    together = editor.guide.write(pictures, texts, longest=6)
    alone = [
        editor.guide.write([p], [t], longest=6)[0]
        for p, t in zip(pictures, texts, strict=True)
    ]
    assert [w.text for w in together] == [w.text for w in alone]


def test_what_cannot_be_asked(editor):
    with pytest.raises(DataError, match="stands for the picture"):
        editor.edit([EditJob(picture(), "put an <image> there")], EditSettings(1))
    with pytest.raises(DataError, match=r"the model reads \d+"):
        editor.edit([EditJob(picture(), "long " * 100)], EditSettings(1))


@pytest.mark.parametrize(
    "text", ["3.5 metres", "Mr. Smith waits.", "a façade → blue", ""]
)
def test_cleaning_keeps_the_words(text):
    assert clean(f"ASSISTANT: {text}</s>\n") == text


# -- editor -----------------------------------------------------------------------------------------------------


def test_the_same_text_by_the_user_gives_the_same_picture(editor):
    first = editor.edit([EditJob(picture(), "paint it blue")], EditSettings(2))[0]
    again = editor.edit(
        [EditJob(picture(), "paint it blue", expressive=first.expressive)],
        EditSettings(2),
    )[0]
    other = editor.edit(
        [EditJob(picture(), "paint it blue", expressive="a star in the moon")],
        EditSettings(2),
    )[0]
    assert (first.source, again.source) == ("model", "user")
    assert first.picture == again.picture
    assert other.picture != first.picture


def test_company_and_sizes_do_not_matter(editor):
    jobs = [
        EditJob(picture(33, 17, seed=i), text, i)
        for i, text in enumerate(["paint it blue", "a", "what is this"])
    ]
    together = editor.edit(jobs, EditSettings(2), batch_size=3)
    for job, result in zip(jobs, together, strict=True):
        alone = editor.edit([job], EditSettings(2))[0]
        assert result.picture.size == (33, 17)
        assert result.expressive == alone.expressive
        pairs = zip(result.picture.tobytes(), alone.picture.tobytes(), strict=True)
        assert max(abs(a - b) for a, b in pairs) <= 1


def test_the_condition_does_not_depend_on_the_denoiser(editor):
    jobs = [EditJob(picture(), "paint it blue")]
    with torch.no_grad():
        before = editor.conditions(jobs).text.clone()
        bias = editor.unet.conv_out.bias.clone()
        editor.unet.conv_out.bias.add_(1)
        assert torch.equal(editor.conditions(jobs).text, before)
        editor.unet.conv_out.bias.copy_(bias)


def test_a_pipeline_of_diffusers(editor, tmp_path):
    editor.pipeline.save_pretrained(tmp_path / "mgie")
    names = sorted(path.name for path in (tmp_path / "mgie").iterdir())
    assert names == [
        "edit_head",
        "mllm",
        "model_index.json",
        "processor",
        "scheduler",
        "unet",
        "vae",
    ]
    pipeline = MGIEPipeline.from_pretrained(tmp_path / "mgie")
    made = pipeline(picture(), "paint it blue", num_inference_steps=2, seed=3)
    ours = editor.edit([EditJob(picture(), "paint it blue", 3)], EditSettings(2))[0]
    assert made.images[0] == ours.picture
    assert made.expressive == [ours.expressive]
    loaded = Mgie.load(str(tmp_path / "mgie"), CPU)
    assert (
        loaded.edit([EditJob(picture(), "paint it blue", 3)], EditSettings(2))[
            0
        ].picture
        == ours.picture
    )


@pytest.mark.slow
def test_bfloat16():
    editor = Mgie.load("tiny-mgie", LoadOptions(device="cpu", dtype="bfloat16"))
    result = editor.edit([EditJob(picture(), "paint it blue")], EditSettings(2))[0]
    assert (
        editor.guide.mllm.dtype
        == editor.unet.dtype
        == editor.edit_head.dtype
        == torch.bfloat16
    )
    assert result.expressive


def test_models_that_do_not_fit(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            "mmedit_cli.picture_editing.methods.mgie.editor.own_image_editors", dict
        )
        with pytest.raises(UserError, match="none was trained"):
            Mgie.load(None, CPU)
    tiny.build("tiny-ip2p").save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="where MGIEPipeline is needed"):
        Mgie.load(str(tmp_path / "other"), CPU)


def test_visual_tokens_start_among_the_others():
    tokens = VisualTokens(4)
    rows = torch.randn(100, 4) * 3 + 5
    tokens.start_from(rows, rows, torch.Generator().manual_seed(0))
    assert len(tokens.embed.unique(dim=0)) == 8
    assert (tokens.embed.mean() - 5).abs() < 2
