"""The stages of training mini-sd: the autoencoder, then text encoder and UNet together, at last with two things."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from mini_sd_data import Captions, Drawn, colours, on_colour, scaled, side_by_side
from mini_sd_model import Recipe, build, build_tokenizer, pipeline, scheduler
from mini_training import BaseTrainee, follow
from mini_vlm_data import NONE, Pictures
from torch import Generator, Tensor, nn

KL = 1e-4  # weight of the divergence from a normal distribution, a number of the latent
CHUNK = 64  # pictures encoded at once


class Trainee(BaseTrainee):
    """The three parts of Stable Diffusion, the running mean of two of them that is shipped, and the pictures.

    The autoencoder learns from every drawing that is not held out, moved, made lighter or darker, and on any colour.
    UNet and text encoder learn from the latents of `drawn.drawings` on the named backgrounds, which are made once.
    """

    def __init__(self, recipe: Recipe, drawn: Drawn, device: torch.device) -> None:
        super().__init__(recipe, device)
        self.drawn, self.pictures = drawn, Pictures(drawn.kb, device)
        self.tokenizer = build_tokenizer(drawn.texts())
        self.vae, self.text_encoder, self.unet = build(recipe, self.tokenizer)
        self.mean = copy.deepcopy(
            nn.ModuleDict({"text_encoder": self.text_encoder, "unet": self.unet})
        )
        self.captions, self._noise = Captions(drawn, self.tokenizer), scheduler()
        place = {key: i for i, key in enumerate(drawn.kb.drawings)}
        self.rows = torch.tensor(
            [place[c["id"], artist] for c, artist in drawn.drawings], device=device
        )
        drawers = [artist for _, artist in drawn.drawings]
        self._by_artist = {
            a: torch.tensor([i for i, b in enumerate(drawers) if a == b])
            for a in set(drawers)
        }
        self._grounds = colours([*drawn.grounds.values()], self.rows)
        self._latents: Tensor | None = None
        self.to(device)

    def usable(self, stage: str) -> Tensor:
        """Return rows of `pictures` for the autoencoder, places in `drawn.drawings` for the diffusion."""
        return (
            self.pictures.usable
            if stage == "vae"
            else torch.arange(len(self.rows), device=self.device)
        )

    def select(self, stage: str) -> dict[str, nn.Parameter]:
        """Let exactly the parameters of a stage be trained and return them by name."""
        parts = ("vae.",) if stage == "vae" else ("text_encoder.", "unet.")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(parts))
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }

    def loss(
        self, stage: str, chosen: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of a stage; there is nothing to be right about."""
        loss = (
            self.vae_loss(chosen, generator)
            if stage == "vae"
            else self.diffusion_loss(stage, chosen, generator)
        )
        return loss, torch.zeros(2, 0, device=self.device)

    def vae_loss(self, chosen: Tensor, generator: Generator) -> Tensor:
        """Take pictures to latents and back: absolute and squared error, and a little divergence."""
        pixels = scaled(self.pictures.draw(chosen, generator)[0])
        latent = self.vae.encode(pixels).latent_dist
        made = self.vae.decode(latent.sample(generator)).sample.float()
        divergence = (
            0.5 * (latent.mean.square() + latent.var - 1 - latent.logvar).mean()
        )
        return F.l1_loss(made, pixels) + F.mse_loss(made, pixels) + KL * divergence

    def diffusion_loss(
        self, stage: str, chosen: Tensor, generator: Generator
    ) -> Tensor:
        """Tell the velocity between noise and latents on a chosen background, at any time, by a caption.

        Some pictures have a second drawing beside the chosen one, by the same artist.
        """
        latents = self.latents()
        count, device = len(chosen), self.device
        colour = torch.randint(
            latents.shape[1], (count,), generator=generator, device=device
        )
        beside = self._beside(chosen, self.recipe.stages[stage].pairs, generator)
        ids = self.captions.encode(
            self.captions.write(chosen, colour, generator, beside)
        ).to(device)
        clean, two = latents[chosen, colour], beside != NONE
        if two.any():
            rows = (self.rows[chosen[two]], self.rows[beside[two]])
            scenes = side_by_side(self.pictures, *rows, self._grounds[colour[two]])
            clean[two] = self._encode(scenes) * self.vae.config.scaling_factor
        noise = torch.randn(clean.shape, generator=generator, device=device)
        steps = self._noise.config.num_train_timesteps
        time = torch.randint(steps, (count,), generator=generator, device=device)
        noisy, wanted = (
            self._noise.add_noise(clean, noise, time),
            self._noise.get_velocity(clean, noise, time),
        )
        hidden = self.text_encoder(ids).last_hidden_state
        return F.mse_loss(self.unet(noisy, time, hidden).sample.float(), wanted)

    @torch.no_grad()
    def latents(self) -> Tensor:
        """Return the scaled latents of all drawings on all backgrounds (n, 9, 4, 16, 16), made at the first call.

        Their scale, one over their standard deviation, becomes the VAE's `scaling_factor`.
        """
        if self._latents is None:
            colours = [
                torch.cat(
                    [
                        self._encode(on_colour(self.pictures, rows, colour))
                        for rows in self.rows.split(CHUNK)
                    ]
                )
                for colour in self.drawn.grounds.values()
            ]
            latents = torch.stack(colours, dim=1)
            self.vae.register_to_config(
                scaling_factor=round(1 / latents.std().item(), 4)
            )
            self._latents = latents * self.vae.config.scaling_factor
        return self._latents

    @torch.no_grad()
    def _encode(self, pictures: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            latents: Tensor = self.vae.encode(pictures).latent_dist.mean
        return latents

    def _beside(self, chosen: Tensor, share: float, generator: Generator) -> Tensor:
        """Return for drawings (B,) another by the same artist for a share of them, else NONE."""
        beside = torch.full_like(chosen, NONE)
        if share:
            chance = torch.rand(2, len(chosen), generator=generator, device=self.device)
            for i in (chance[0] < share).nonzero().flatten().tolist():
                same = self._by_artist[self.drawn.drawings[int(chosen[i])][1]]
                beside[i] = same[int(chance[1, i] * len(same))]
        return beside

    def stepped(self, stage: str, step: int) -> None:
        """Let the running mean of the weights follow."""
        if stage != "vae":
            follow(self.mean, self, step)

    def pipeline(self) -> Any:
        """Return what is shipped: the pipeline with the running means."""
        return pipeline(
            self.vae, self.mean["text_encoder"], self.tokenizer, self.mean["unet"]
        )
