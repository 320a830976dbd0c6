"""Learning a subject as DreamBooth does (Ruiz et al. 2023): an identifier and its superclass, on a few photos."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from mmedit_cli.drawing.methods.shared.photos import Photos, open_squares, side_by_side
from mmedit_cli.drawing.methods.shared.variants import (
    Variants,
    check_coloured,
    on_colours,
    replace_some,
)
from mmedit_cli.drawing.models.prompts import Tokens, Word
from mmedit_cli.drawing.models.stable_diffusion import (
    Encoding,
    Sampling,
    StableDiffusion,
)
from mmedit_cli.errors import MmeditError
from mmedit_cli.patch import trainable
from mmedit_cli.types import Concept

_RARE_FROM = 40_000  # ids of CLIP's vocabulary from which its tokens are rare


@dataclass(frozen=True)
class SubjectHparams:
    """What all methods that learn an identifier share; `side` are pixels; see hparams/dreambooth.yaml."""

    steps: int = 800
    batch_size: int = 1
    learning_rate: float = 5e-6
    weight_decay: float = 0.01
    clip: float | None = 1.0
    train_text_encoder: bool = True
    prior_weight: float = 0.0
    prior_images: int = 40
    prior_guidance: float | None = None
    beside: float = 0.0
    beside_words: tuple[str, ...] = ()
    coloured: float = 0.0
    colours: tuple[str, ...] = ()
    identifier: str = ""
    template: str = "a photo of {}"
    side: int | None = None
    center_crop: bool = True
    flip: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate", "prior_images"):
            value = getattr(self, name)
            if value <= 0:
                raise ValueError(f"{name} must be above 0, not {value}")
        if self.prior_weight < 0:
            raise ValueError(
                f"prior_weight must not be below 0, not {self.prior_weight}"
            )
        if not 0 <= self.beside < 1:
            raise ValueError(f"beside must be from 0 to below 1, not {self.beside}")
        if self.beside and not self.beside_words:
            raise ValueError(
                "beside needs beside_words: what the model can draw beside the subject, e.g. [a cat]"
            )
        check_coloured(self.coloured, self.colours)
        if self.template.count("{}") != 1:
            raise ValueError("template must have one {} where the subject stands")


def identifier(tokenizer: Any, token: str, taken: Collection[str]) -> str:
    """Return a word that means nothing to the model; the same token always gets the same word.

    It is a rare token of CLIP's vocabulary (two or three letters, a high id), or random letters if there is none.
    """
    free = []
    for token_text, i in tokenizer.get_vocab().items():
        if i < _RARE_FROM or not re.fullmatch(r"[a-z]{2,3}</w>", token_text):
            continue
        word = token_text.removesuffix("</w>")
        if word not in taken:
            free.append(word)
    free.sort()
    digest = hashlib.sha256(token.encode()).digest()
    if free:
        number = int.from_bytes(digest[:8], "big")
        return str(free[number % len(free)])
    letters = [chr(ord("a") + byte % 26) for byte in digest[:4]]
    return "sks" + "".join(letters)


class SubjectTraining:
    """The training of one subject: photos, prompts, and the loss of a step with or without prior preservation.

    With `beside`, some photos stand at half their size beside something the model draws, and the prompt names both:
    so the subject learns to share a picture (Cut-Mix of SVDiff, Han et al. 2023). With `coloured`, some photos that
    have a transparent background stand on a colour that the prompt names: so the background is not learned with them.
    """

    def __init__(
        self,
        model: StableDiffusion,
        concept: Concept,
        hparams: Any,
        source: Generator,
        name: str,
    ) -> None:
        self.model = model
        self.hp = hparams
        self.source = source
        self.resolution = hparams.side or model.resolution
        squares = open_squares(
            concept.images, self.resolution, crop=hparams.center_crop
        )
        self.photos = Photos(model, squares, flip=hparams.flip)
        subject = f"{name} {concept.superclass}"
        self.prompts = [hparams.template.format(subject)]
        self.prior: Photos | None = None
        self.variants: list[Variants] = []
        if hparams.prior_weight:
            superclass = hparams.template.format(concept.superclass)
            self.prompts.append(superclass)
            drawn = self._draw([superclass] * hparams.prior_images)
            self.prior = Photos(model, drawn, flip=hparams.flip)
        if hparams.beside:
            scenes = self._scenes(squares, subject)
            self._add(hparams.beside, scenes, flip=0.0)
        if hparams.coloured:
            pictures = on_colours(
                concept.images,
                hparams.colours,
                self.prompts[0],
                self.resolution,
                crop=hparams.center_crop,
            )
            if pictures:
                self._add(hparams.coloured, pictures, flip=hparams.flip)

    def run(
        self,
        parameters: Sequence[nn.Parameter],
        tick: Callable[[int], None],
        *,
        text: bool,
        float_copies: bool = False,
    ) -> list[float]:
        """Train the parameters and return the losses; `text` says whether they change the text encoders.

        With `float_copies`, steps are taken on float32 copies: in low precision small steps would round to nothing.
        """
        hp = self.hp
        copies: list[Tensor] = list(parameters)
        if float_copies:
            copies = [tensor.detach().float().clone() for tensor in parameters]
        optimizer = torch.optim.AdamW(
            copies,
            lr=hp.learning_rate,
            weight_decay=hp.weight_decay,
        )
        fixed_encodings = None if text else self._encode_all()
        losses = []
        with trainable(parameters):
            for _ in range(hp.steps):
                for parameter in parameters:
                    parameter.grad = None
                loss = self._backward(fixed_encodings)
                if hp.clip is not None:
                    nn.utils.clip_grad_norm_(parameters, hp.clip)
                _step(optimizer, parameters, copies)
                losses.append(loss)
                tick(1)
        return losses

    def _backward(self, fixed_encodings: Encoding | None) -> float:
        """Run one batch forward and backward; return its loss."""
        latents, prompts = self._batch()
        tokens = self._tokens(prompts)
        fixed = fixed_encodings
        encoding = self.model.encode(tokens) if fixed is None else fixed.rows(prompts)
        with self.model.running(tokens, encoding):
            loss = self._loss(latents, encoding)
            if not loss.isfinite():
                raise MmeditError(
                    f"the loss became {loss.item()}", "lower learning_rate"
                )
            torch.autograd.backward(loss)
        return loss.item()

    def _batch(self) -> tuple[Tensor, list[int]]:
        """Return the latents of a step and the index of each one's prompt; those of the superclass come last."""
        count = self.hp.batch_size
        latents, _ = self.photos.sample(count, self.source)
        prompts = [0] * count
        for variants in self.variants:
            replace_some(latents, prompts, variants, self.source)
        if self.prior is None:
            return latents, prompts
        of_superclass, _ = self.prior.sample(count, self.source)
        prompts += [1] * count
        return torch.cat([latents, of_superclass]), prompts

    def _loss(self, latents: Tensor, encoding: Encoding) -> Tensor:
        errors = self.model.errors(latents, encoding, self.source)
        if self.prior is None:
            return errors.mean()
        # DreamBooth, equation 2: the second term preserves the prior of the superclass.
        own, of_superclass = errors.chunk(2)
        prior_loss: Tensor = self.hp.prior_weight * of_superclass.mean()
        return own.mean() + prior_loss

    def _tokens(self, prompts: Sequence[int]) -> Tokens:
        return self.model.tokenize([self.prompts[i] for i in prompts])

    @torch.no_grad()
    def _encode_all(self) -> Encoding:
        every = range(len(self.prompts))
        return self.model.encode(self._tokens(every))

    def _add(
        self, share: float, pictures: Sequence[tuple[Any, str]], *, flip: float
    ) -> None:
        """Let pictures with prompts of their own take a share of every batch."""
        images = []
        texts = []
        for image, text in pictures:
            images.append(image)
            texts.append(text)
        self.prompts += dict.fromkeys(texts)
        variants = Variants(
            share,
            Photos(self.model, images, flip=flip),
            prompts=[self.prompts.index(text) for text in texts],
        )
        self.variants.append(variants)

    def _scenes(self, squares: Sequence[Any], subject: str) -> list[tuple[Any, str]]:
        """Return each photo to the left and to the right of each other thing, with the prompt of the scene."""
        words = self.hp.beside_words
        prompt = self.hp.template.format
        others = self._draw([prompt(word) for word in words])
        scenes = []
        for square in squares:
            for other, word in zip(others, words, strict=True):
                left = side_by_side(square, other)
                right = side_by_side(other, square)
                scenes.append((left, prompt(f"{subject} and {word}")))
                scenes.append((right, prompt(f"{word} and {subject}")))
        return scenes

    def _draw(self, prompts: Sequence[str]) -> list[Any]:
        """Return what the model draws for prompts before it is trained."""
        sampling = Sampling(
            guidance=self.hp.prior_guidance,
            resolution=self.resolution,
        )
        seeds = range(len(prompts))
        return self.model.generate(prompts, seeds, sampling)


def word_for(name: str, superclass: str) -> Word:
    """Return what the token of a subject stands for in a prompt."""
    return Word(f"{name} {superclass}")


def _step(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    copies: Sequence[Tensor],
) -> None:
    """Take a step on the copies, which may be the parameters themselves, and write them back."""
    if copies[0] is parameters[0]:
        optimizer.step()
        return
    for copy, parameter in zip(copies, parameters, strict=True):
        copy.grad = None if parameter.grad is None else parameter.grad.float()
    optimizer.step()
    with torch.no_grad():
        for copy, parameter in zip(copies, parameters, strict=True):
            parameter.copy_(copy)
