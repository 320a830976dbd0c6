"""The scripts that train mini-ip2p: it starts from the text-to-image model, learns, and a stop changes nothing."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import ROOT, imported_scripts
from safetensors.torch import load_file

from mmedit_cli import runtime
from mmedit_cli.errors import UserError
from mmedit_cli.picture_editing.data import emojikb_edits

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scripts():
    """The modules of the scripts, imported as the scripts do."""
    with imported_scripts(
        model="mini_sd_model",
        runs="mini_runs",
        train="train_mini_ip2p",
        training="mini_ip2p_training",
    ) as modules:
        runtime.quiet_libraries()
        yield modules


@pytest.fixture(scope="module")
def start(scripts, tmp_path_factory):
    """A text-to-image model of random weights whose tokenizer knows some of the words."""
    recipe = scripts.model.Recipe.read(ROOT / "scripts" / "mini_sd.yaml", quick=True)
    tokenizer = scripts.model.build_tokenizer(
        ["a twemoji drawing of a red apple on a blue background"]
    )
    folder = tmp_path_factory.mktemp("start")
    vae, text_encoder, unet = scripts.model.build(recipe, tokenizer)
    scripts.model.export(
        scripts.model.pipeline(vae, text_encoder, tokenizer, unet),
        folder / "mini-sd",
        {},
    )
    return folder / "mini-sd"


@pytest.fixture(scope="module")
def recipe(scripts):
    return scripts.training.Recipe.read(ROOT / "scripts" / "mini_ip2p.yaml", quick=True)


@pytest.fixture(scope="module")
def trained(scripts, start, recipe, tmp_path_factory):
    """A run of some seconds without a stop."""
    out = tmp_path_factory.mktemp("mini_ip2p")
    stop = scripts.runs.Stop()
    assert scripts.train.train(
        recipe, out, device=CPU, stages=recipe.STAGES, stop=stop, start=start
    )
    return out


def test_before_training_it_is_the_model_it_starts_from(
    scripts, start, recipe, tmp_path
):
    from diffusers import StableDiffusionPipeline

    trainee = scripts.training.Trainee(recipe, start, CPU)
    pipe = StableDiffusionPipeline.from_pretrained(start)
    noisy, seen = torch.randn(
        2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(1)
    )
    ids = pipe.tokenizer(["a red apple"], padding="max_length", return_tensors="pt")[
        "input_ids"
    ]
    own = trainee.tokenizer(["a red apple"], padding="max_length", return_tensors="pt")[
        "input_ids"
    ]
    assert not torch.equal(ids, own)
    with torch.no_grad():
        said, expected = trainee.text_encoder(own)[0], pipe.text_encoder(ids)[0]
        assert torch.equal(said, expected)
        time = torch.tensor([7])
        found = trainee.unet(torch.cat([noisy[:1], seen[:1]], 1), time, said).sample
        assert torch.allclose(
            found, pipe.unet(noisy[:1], time, expected).sample, atol=1e-6
        )


def test_every_instruction_has_a_token_a_word(scripts, start, recipe):
    tokenizer = scripts.training.Trainee(recipe, start, CPU).tokenizer
    for split in emojikb_edits.SPLITS:
        for text in {pair.instruction for pair in emojikb_edits.pairs(split)[::50]}:
            assert len(tokenizer(text)["input_ids"]) <= tokenizer.model_max_length, text
    assert len(tokenizer.tokenize("draw it in the style of openmoji")) == 7


def test_latents_are_those_of_the_pairs(scripts, start, recipe, tmp_path):
    trainee = scripts.training.Trainee(recipe, start, CPU)
    trainee.prepare(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    encode = scripts.training.encode_pictures
    for i in (0, 7, len(trainee.pairs) - 1):
        pair = trainee.pairs[i]
        for place, picture in zip(
            trainee.ends[i], (pair.source(), pair.target()), strict=True
        ):
            with torch.no_grad():
                expected = encode(trainee.vae, [picture])[0]
            assert torch.allclose(trainee.latents[place].float(), expected, atol=2e-3)
    again = scripts.training.Trainee(recipe, start, CPU)
    again.prepare(tmp_path)
    assert torch.equal(again.latents, trainee.latents)


def test_a_stop_changes_no_bit(scripts, start, recipe, trained, tmp_path):
    stops = 0
    options = {"device": CPU, "stages": recipe.STAGES, "start": start}
    while not scripts.train.train(
        recipe, tmp_path, stop=scripts.runs.Stop(steps=25), **options
    ):
        stops += 1
    assert stops >= 2
    name = "mini-ip2p/unet/diffusion_pytorch_model.safetensors"
    assert (trained / name).read_bytes() == (tmp_path / name).read_bytes()


def test_it_learns_and_the_autoencoder_stays(start, trained):
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (start / vae).read_bytes() == (trained / "mini-ip2p" / vae).read_bytes()
    unet = load_file(
        trained / "mini-ip2p" / "unet" / "diffusion_pytorch_model.safetensors"
    )
    assert unet["conv_in.weight"][:, 4:].abs().max() > 0
    told = json.loads((trained / "mini-ip2p" / "training.json").read_text())
    assert told["stages"]["edits"]["finished"]
    assert told["start"] == "mini-sd"


def test_the_folder_does_not_say_where_it_came_from(start, trained):
    configs = [path.read_text() for path in (trained / "mini-ip2p").rglob("*.json")]
    assert len(configs) > 4
    assert not any(str(start.parent) in text for text in configs)


def test_the_folder_edits_pictures(trained, tmp_path, cli):
    picture = ROOT / "data" / "emojikb" / "noto" / "1f34e.png"
    out = tmp_path / "out.png"
    words = (
        "image-edit",
        "instruct-pix2pix",
        "--model",
        trained / "mini-ip2p",
        "--image",
        picture,
    )
    code, _, error = cli(*words, "make the background blue", "-o", out, "--steps", 2)
    assert (code, error.count("error")) == (0, 0), error
    assert out.is_file()


def test_a_folder_that_is_no_model_is_refused(scripts, recipe, tmp_path):
    with pytest.raises(UserError, match="no text-to-image model there"):
        scripts.training.Trainee(recipe, tmp_path, CPU)
