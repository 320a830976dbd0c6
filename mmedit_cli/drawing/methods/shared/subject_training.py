"""Learning a subject as DreamBooth does (Ruiz et al. 2023): an identifier and its superclass, on a few photos."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from mmedit_cli.drawing.data.base import with_article
from mmedit_cli.drawing.methods.shared.photos import Photos, open_squares, side_by_side
from mmedit_cli.drawing.models.prompts import Word
from mmedit_cli.drawing.models.stable_diffusion import (
    Encoding,
    Sampling,
    StableDiffusion,
    Tokens,
)
from mmedit_cli.errors import MmeditError
from mmedit_cli.patch import trainable
from mmedit_cli.pictures import load_alpha
from mmedit_cli.types import Concept

_RARE_FROM = 40_000  # ids of CLIP's vocabulary from which its tokens are rare


@dataclass(frozen=True)
class SubjectHparams:
    """What all methods that learn an identifier share; see hparams/dreambooth.yaml."""

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
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.prior_weight < 0:
            raise ValueError(
                f"prior_weight must not be below 0, not {self.prior_weight}"
            )
        for name in ("beside", "coloured"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be from 0 to below 1, not {getattr(self, name)}"
                )
        if self.beside and not self.beside_words:
            raise ValueError(
                "beside needs beside_words: what the model can draw beside the subject, e.g. [a cat]"
            )
        if self.coloured and not self.colours:
            raise ValueError(
                'coloured needs colours behind the subject, by name, e.g. ["blue #b3d1ff"]'
            )
        if wrong := [
            colour
            for colour in self.colours
            if not re.fullmatch(r"\S.* #[0-9a-fA-F]{6}", colour)
        ]:
            raise ValueError(
                f"colours: {wrong[0]!r} is not a name and a colour, as 'blue #b3d1ff'"
            )
        if self.template.count("{}") != 1:
            raise ValueError("template must have one {} where the subject stands")


def identifier(tokenizer: Any, token: str, taken: Collection[str]) -> str:
    """Return a word that means nothing to the model, for a token of one's own: always the same for the same token.

    It is a rare token of CLIP's vocabulary (two or three letters, a high id), or letters where there is none.
    """
    rare = sorted(
        word.removesuffix("</w>")
        for word, i in tokenizer.get_vocab().items()
        if i >= _RARE_FROM and re.fullmatch(r"[a-z]{2,3}</w>", word)
    )
    free = [word for word in rare if word not in taken]
    digest = hashlib.sha256(token.encode()).digest()
    if free:
        return free[int.from_bytes(digest[:8], "big") % len(free)]
    return "sks" + "".join(chr(ord("a") + byte % 26) for byte in digest[:4])


class Variants(NamedTuple):
    """Photos in another form: the share of a batch that they take, and which prompt goes with each."""

    share: float
    photos: Photos
    prompts: list[int]


class SubjectLesson:
    """The learning of one subject: photos, prompts, and the loss of a step with or without prior preservation.

    With `beside`, some photos stand in half their size beside something the model draws, and the prompt names both:
    so the subject learns to share a picture (Cut-Mix of SVDiff, Han et al. 2023). With `coloured`, some that have a
    transparent background stand on a colour that the prompt names: so what is behind them is not learned with them.
    """

    def __init__(
        self,
        model: StableDiffusion,
        concept: Concept,
        hparams: Any,
        source: Generator,
        name: str,
    ) -> None:
        self.model, self.hp, self.source = model, hparams, source
        squares = open_squares(
            concept.images, hparams.side or model.resolution, crop=hparams.center_crop
        )
        self.photos = Photos(model, squares, flip=hparams.flip)
        subject, superclass = (
            f"{name} {concept.superclass}",
            hparams.template.format(concept.superclass),
        )
        self.prompts = [hparams.template.format(subject)]
        self.prior, self.variants = None, []
        if hparams.prior_weight:
            self.prompts.append(superclass)
            self.prior = Photos(
                model,
                self._drawn([superclass] * hparams.prior_images),
                flip=hparams.flip,
            )
        if hparams.beside:
            self._add(hparams.beside, self._scenes(squares, subject), flip=0.0)
        if hparams.coloured and (pictures := self._coloured(concept.images)):
            self._add(hparams.coloured, pictures, flip=hparams.flip)

    def run(
        self,
        parameters: Sequence[nn.Parameter],
        tick: Callable[[int], None],
        *,
        text: bool,
        float_copies: bool = False,
    ) -> list[float]:
        """Train the parameters; return the losses. `text` says whether they change what the text encoders say.

        With `float_copies` steps are taken on float32 copies: in low precision small ones would round to nothing.
        """
        hp = self.hp
        copies = (
            [p.detach().float().clone() for p in parameters]
            if float_copies
            else list(parameters)
        )
        optimizer = torch.optim.AdamW(
            copies, lr=hp.learning_rate, weight_decay=hp.weight_decay
        )
        encode = self._encoder(cached=not text)
        losses = []
        with trainable(parameters):
            for _ in range(hp.steps):
                for parameter in parameters:
                    parameter.grad = None
                latents, shown = self._batch()
                tokens, encoding = encode(shown)
                with self.model.running(tokens, encoding):
                    loss = self._loss(latents, encoding)
                    if not loss.isfinite():
                        raise MmeditError(
                            f"the loss became {loss.item()}", "lower learning_rate"
                        )
                    loss.backward()
                if hp.clip is not None:
                    nn.utils.clip_grad_norm_(parameters, hp.clip)
                _step(optimizer, parameters, copies)
                losses.append(loss.item())
                tick(1)
        return losses

    def _batch(self) -> tuple[Tensor, list[int]]:
        """Return the latents of a step, those of the superclass behind the others, and the prompt of each."""
        count = self.hp.batch_size
        latents, shown = self.photos.sample(count, self.source)[0], [0] * count
        for variants in self.variants:
            rows = (
                torch.rand(count, generator=self.source) < variants.share
            ).nonzero()[:, 0]
            which = torch.randint(
                0, len(variants.photos), rows.shape, generator=self.source
            )
            latents[rows.to(latents.device)] = variants.photos.at(which, self.source)[0]
            for row, i in zip(rows.tolist(), which.tolist(), strict=True):
                shown[row] = variants.prompts[i]
        if self.prior is None:
            return latents, shown
        return torch.cat([latents, self.prior.sample(count, self.source)[0]]), [
            *shown,
            *[1] * count,
        ]

    def _loss(self, latents: Tensor, encoding: Encoding) -> Tensor:
        errors = self.model.errors(latents, encoding, self.source)
        if self.prior is None:
            return errors.mean()
        own, kind = errors.chunk(2)
        return own.mean() + self.hp.prior_weight * kind.mean()

    def _encoder(
        self, *, cached: bool
    ) -> Callable[[list[int]], tuple[Tokens, Encoding]]:
        """Return a function from the prompts of a step to their tokens and encodings."""

        def tokens_of(shown: list[int]) -> Tokens:
            return self.model.tokenize([self.prompts[i] for i in shown])

        if not cached:
            return lambda shown: (
                (tokens := tokens_of(shown)),
                self.model.encode(tokens),
            )
        with torch.no_grad():
            every = self.model.encode(tokens_of(list(range(len(self.prompts)))))
        return lambda shown: (tokens_of(shown), every.rows(shown))

    def _add(
        self, share: float, pictures: Sequence[tuple[Any, str]], *, flip: float
    ) -> None:
        """Let pictures with prompts of their own take a share of every batch."""
        self.prompts += dict.fromkeys(text for _, text in pictures)
        photos = Photos(self.model, [picture for picture, _ in pictures], flip=flip)
        self.variants.append(
            Variants(share, photos, [self.prompts.index(text) for _, text in pictures])
        )

    def _scenes(self, squares: Sequence[Any], subject: str) -> list[tuple[Any, str]]:
        """Return each photo beside each of the words, on either side, and what there is to say of it."""
        words, say = self.hp.beside_words, self.hp.template.format
        others = self._drawn([say(word) for word in words])
        return [
            scene
            for square in squares
            for other, word in zip(others, words, strict=True)
            for scene in (
                (side_by_side(square, other), say(f"{subject} and {word}")),
                (side_by_side(other, square), say(f"{word} and {subject}")),
            )
        ]

    def _coloured(self, images: Sequence[Path]) -> list[tuple[Any, str]]:
        """Return each photo that has a transparent background on each colour, and what there is to say of it."""
        clear = [path for path in images if load_alpha(path) is not None]
        found: list[tuple[Any, str]] = []
        for name, colour in (text.rsplit(" ", 1) for text in self.hp.colours):
            squares = open_squares(
                clear,
                self.hp.side or self.model.resolution,
                crop=self.hp.center_crop,
                background=colour,
            )
            found += [
                (square, f"{self.prompts[0]} on {with_article(name)} background")
                for square in squares
            ]
        return found

    def _drawn(self, prompts: Sequence[str]) -> list[Any]:
        """Return what the model draws to prompts as it is."""
        sampling = Sampling(
            guidance=self.hp.prior_guidance, side=self.hp.side or self.model.resolution
        )
        return self.model.generate(prompts, range(len(prompts)), sampling)


def word_for(name: str, superclass: str) -> Word:
    """Return what the token of a subject stands for in a prompt."""
    return Word(f"{name} {superclass}")


def _step(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    copies: Sequence[Tensor],
) -> None:
    if copies[0] is parameters[0]:
        optimizer.step()
        return
    for copy, parameter in zip(copies, parameters, strict=True):
        copy.grad = None if parameter.grad is None else parameter.grad.float()
    optimizer.step()
    with torch.no_grad():
        for copy, parameter in zip(copies, parameters, strict=True):
            parameter.copy_(copy)
