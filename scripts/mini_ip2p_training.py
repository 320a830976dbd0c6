"""What mini-ip2p is made of and how it learns: pairs as latents, made once; the denoiser and the reader of texts."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mini_sd_model import LONGEST, build_tokenizer, scheduler
from mini_training import BaseRecipe, BaseTrainee, Schedule, follow
from safetensors.torch import load_file, save
from torch import Generator, Tensor, nn

from mmedit_cli.errors import UserError
from mmedit_cli.picture_editing.data import emojikb_edits
from mmedit_cli.picture_editing.data.base import EditPair, fingerprint
from mmedit_cli.picture_editing.methods.mgie.modules import widened
from mmedit_cli.picture_editing.methods.mgie.training import dropped
from mmedit_cli.picture_editing.methods.shared.latent import encode_pictures
from mmedit_cli.storage import write_atomic

CHUNK = 64  # pictures encoded at once


@dataclass(frozen=True)
class Recipe(BaseRecipe):
    """Everything a training run depends on but data, machine and the model it starts from."""

    STAGES = ("edits",)
    STAGE = Schedule

    drop: float


class Trainee(BaseTrainee):
    """The parts of an InstructPix2Pix, the running mean that is shipped, and the pairs as latents.

    The autoencoder stays as it is. The denoiser of the text-to-image model gets channels for the picture, which start
    at zero; its reader of texts gets the words of the instructions.
    """

    def __init__(self, recipe: Recipe, start: Path, device: torch.device) -> None:
        super().__init__(recipe, device)
        from diffusers import StableDiffusionPipeline

        if not (start / "model_index.json").is_file():
            raise UserError(
                f"{start}: no text-to-image model there",
                "train it first: scripts/train_mini_sd.py",
            )
        pipe = StableDiffusionPipeline.from_pretrained(
            start, local_files_only=True, trust_remote_code=False
        )
        self.start = start.name
        data, self._turns = recipe.data, recipe.data["turns"]
        self.pairs: list[EditPair] = [
            pair
            for i in range(data["variations"])
            for pair in emojikb_edits.pairs(data["split"], i)[: data["limit"]]
        ]
        self.tokenizer = build_tokenizer(_words(pipe.tokenizer))
        self.vae, self.unet = pipe.vae.requires_grad_(False), pipe.unet
        channels = 2 * pipe.vae.config.latent_channels
        self.unet.conv_in = widened(self.unet.conv_in, channels)
        self.unet.register_to_config(in_channels=channels)
        self.text_encoder = _reader(pipe, self.tokenizer, recipe.seed)
        self.mean = copy.deepcopy(
            nn.ModuleDict({"text_encoder": self.text_encoder, "unet": self.unet})
        )
        self._noise = scheduler()
        texts = [pair.instruction for pair in self.pairs]
        self.texts = sorted(set(texts))
        place = {text: i for i, text in enumerate(self.texts)}
        self.said = torch.tensor([place[text] for text in texts], device=device)
        self.ids = self._encode([*self.texts, ""]).to(
            device
        )  # the last one says nothing
        self.latents, self.ends = torch.empty(0), torch.empty(0)
        self.to(device)

    def _encode(self, texts: list[str]) -> Tensor:
        encoded = self.tokenizer(
            texts, padding="max_length", truncation=True, return_tensors="pt"
        )
        ids: Tensor = encoded["input_ids"]
        return ids

    @torch.no_grad()
    def prepare(self, out: Path) -> None:
        """Fill `latents` (n, 4, 16, 16), of every picture once, and `ends` (P, 2): before and after of each pair.

        They are kept in `out`, named after the pairs and the autoencoder.
        """
        weights = hashlib.sha256(
            b"".join(p.cpu().numpy().tobytes() for p in self.vae.parameters())
        ).hexdigest()
        path = out / f"latents-{fingerprint(self.pairs)}-{weights[:8]}.safetensors"
        if not path.is_file():
            place: dict[bytes, int] = {}
            fresh, found, ends = [], [], []
            for pair in self.pairs:
                for picture in (pair.source(), pair.target()):
                    key = picture.tobytes()
                    if key not in place:
                        place[key] = len(place)
                        fresh.append(picture)
                    ends.append(place[key])
                if len(fresh) >= CHUNK:
                    found.append(encode_pictures(self.vae, fresh).half().cpu())
                    fresh = []
            found += [encode_pictures(self.vae, fresh).half().cpu()] if fresh else []
            tensors = {
                "latents": torch.cat(found).contiguous(),
                "ends": torch.tensor(ends).view(-1, 2),
            }
            write_atomic(path, save(tensors))
        tensors = load_file(path, device=str(self.device))
        self.latents, self.ends = tensors["latents"], tensors["ends"]

    def usable(self, stage: str) -> Tensor:
        """Return the pairs of a pass, those of some kinds several times."""
        turns = torch.tensor([self._turns.get(pair.kind, 1) for pair in self.pairs])
        return torch.arange(len(self.pairs)).repeat_interleave(turns).to(self.device)

    def select(self, stage: str) -> dict[str, nn.Parameter]:
        """Return denoiser and text encoder by name."""
        parts = ("text_encoder.", "unet.")
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name.startswith(parts)
        }

    def loss(
        self, stage: str, chosen: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of pairs (B,): the velocity from noise to the picture after, by picture and instruction."""
        count, device = len(chosen), self.device
        before, after = (self.latents[self.ends[chosen, i]].float() for i in (0, 1))
        clean = after * self.vae.config.scaling_factor
        u = torch.rand(count, generator=generator, device=device)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        time = torch.randint(
            self._noise.config.num_train_timesteps,
            (count,),
            generator=generator,
            device=device,
        )
        silent, blind = dropped(u, self.recipe.drop)
        ids = torch.where(silent[:, None], self.ids[-1], self.ids[self.said[chosen]])
        noisy, wanted = (
            self._noise.add_noise(clean, noise, time),
            self._noise.get_velocity(clean, noise, time),
        )
        inputs = torch.cat([noisy, before * (~blind)[:, None, None, None]], 1)
        hidden = self.text_encoder(ids).last_hidden_state
        found = F.mse_loss(self.unet(inputs, time, hidden).sample.float(), wanted)
        return found, torch.zeros(2, 0, device=device)

    def stepped(self, stage: str, step: int) -> None:
        """Let the running mean of the weights follow."""
        follow(self.mean, self, step)

    def pipeline(self) -> Any:
        """Return what is shipped: the pipeline with the running means."""
        from diffusers import StableDiffusionInstructPix2PixPipeline

        parts = (
            self.vae,
            self.mean["text_encoder"],
            self.tokenizer,
            self.mean["unet"],
            scheduler(),
        )
        return StableDiffusionInstructPix2PixPipeline(
            *parts, None, None, requires_safety_checker=False
        )


def _words(tokenizer: Any) -> Iterator[str]:
    """Yield what the tokenizer must know in whole words: those of the text-to-image model, and all instructions."""
    yield from (
        token.removesuffix("</w>")
        for token in tokenizer.get_vocab()
        if token.endswith("</w>")
    )
    yield from _instructions()


@cache
def _instructions() -> list[str]:
    return sorted(
        {
            pair.instruction
            for split in emojikb_edits.SPLITS
            for pair in emojikb_edits.pairs(split)
        }
    )


def _reader(pipe: Any, tokenizer: Any, seed: int) -> Any:
    """Return the text encoder of a pipeline with the vocabulary of another tokenizer; common tokens keep their row."""
    from transformers import CLIPTextModel

    old = pipe.text_encoder
    config = copy.deepcopy(old.config)
    config.vocab_size = len(tokenizer)
    assert config.max_position_embeddings == LONGEST
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = CLIPTextModel(config)
    weights = old.state_dict()
    matrix = next(name for name in weights if name.endswith("token_embedding.weight"))
    rows = reader.state_dict()[matrix].clone()
    known, words = pipe.tokenizer.get_vocab(), tokenizer.get_vocab()
    for token, row in words.items():
        if token in known:
            rows[row] = weights[matrix][known[token]]
    reader.load_state_dict({**weights, matrix: rows})
    return reader
