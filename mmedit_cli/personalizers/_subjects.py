"""Learning a subject as DreamBooth does (Ruiz et al. 2023): an identifier and its superclass, on a few photos."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from mmedit_cli.backbones._prompts import Word
from mmedit_cli.backbones.stable_diffusion import Encoding, Sampling, StableDiffusion, Tokens
from mmedit_cli.errors import MmeditError
from mmedit_cli.patch import trainable
from mmedit_cli.personalizers._photos import Photos, open_squares
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
            raise ValueError(f"prior_weight must not be below 0, not {self.prior_weight}")
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


class SubjectLesson:
    """The learning of one subject: photos, prompts, and the loss of a step with or without prior preservation."""

    def __init__(self, model: StableDiffusion, concept: Concept, hparams: Any, source: Generator, name: str) -> None:
        self.model, self.hp, self.source = model, hparams, source
        side = hparams.side or model.side
        self.photos = Photos(model, open_squares(concept.images, side, crop=hparams.center_crop), flip=hparams.flip)
        self.prompts = [hparams.template.format(f"{name} {concept.superclass}")]
        self.prior = None
        if hparams.prior_weight:
            self.prompts.append(hparams.template.format(concept.superclass))
            self.prior = Photos(model, self._class_images(), flip=hparams.flip)

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
        copies = [p.detach().float().clone() for p in parameters] if float_copies else list(parameters)
        optimizer = torch.optim.AdamW(copies, lr=hp.learning_rate, weight_decay=hp.weight_decay)
        encode = self._encoded(cached=not text)
        losses = []
        with trainable(parameters):
            for _ in range(hp.steps):
                for parameter in parameters:
                    parameter.grad = None
                tokens, encoding = encode()
                with self.model.running(tokens, encoding):
                    loss = self._loss(encoding)
                    if not loss.isfinite():
                        raise MmeditError(f"the loss became {loss.item()}", "lower learning_rate")
                    loss.backward()
                if hp.clip is not None:
                    nn.utils.clip_grad_norm_(parameters, hp.clip)
                _step(optimizer, parameters, copies)
                losses.append(loss.item())
                tick(1)
        return losses

    def _loss(self, encoding: Encoding) -> Tensor:
        latents = self.photos.sample(self.hp.batch_size, self.source)[0]
        if self.prior is None:
            return self.model.errors(latents, encoding, self.source).mean()
        both = torch.cat([latents, self.prior.sample(self.hp.batch_size, self.source)[0]])
        errors = self.model.errors(both, encoding, self.source)
        own, kind = errors.chunk(2)
        return own.mean() + self.hp.prior_weight * kind.mean()

    def _encoded(self, *, cached: bool) -> Callable[[], tuple[Tokens, Encoding]]:
        """Return a function for the prompts of a step and their encodings."""
        tokens = self.model.tokenize([prompt for prompt in self.prompts for _ in range(self.hp.batch_size)])
        if not cached:
            return lambda: (tokens, self.model.encode(tokens))
        with torch.no_grad():
            encoding = self.model.encode(tokens)
        return lambda: (tokens, encoding)

    def _class_images(self) -> list[Any]:
        """Draw what the model takes the superclass to look like."""
        count = self.hp.prior_images
        return self.model.generate(
            [self.prompts[1]] * count, range(count), Sampling(side=self.hp.side or self.model.side)
        )


def word_for(name: str, superclass: str) -> Word:
    """Return what the token of a subject stands for in a prompt."""
    return Word(f"{name} {superclass}")


def forked(seed: int) -> ExitStack:
    """Return a block in which libraries that draw from the global source of randomness start from `seed`."""
    stack = ExitStack()
    stack.enter_context(torch.random.fork_rng(devices=[]))
    torch.manual_seed(seed)
    return stack


def _step(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], copies: Sequence[Tensor]) -> None:
    if copies[0] is parameters[0]:
        optimizer.step()
        return
    for copy, parameter in zip(copies, parameters, strict=True):
        copy.grad = None if parameter.grad is None else parameter.grad.float()
    optimizer.step()
    with torch.no_grad():
        for copy, parameter in zip(copies, parameters, strict=True):
            parameter.copy_(copy)
