"""Multi-MELO for diffusion: a LoRA block a subject, all in one model, and a router that reads the prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from mmedit_cli.drawing.methods.base import Learned, Personalizer, Tick, summary
from mmedit_cli.drawing.methods.multi_melo_diffusion.routing import (
    TokenTrie,
    mean_encoding,
    nearest,
)
from mmedit_cli.drawing.methods.shared import lora_files
from mmedit_cli.drawing.methods.shared.subject_training import (
    SubjectHparams,
    SubjectLesson,
    identifier,
    word_for,
)
from mmedit_cli.drawing.models.stable_diffusion import Tokens
from mmedit_cli.errors import StateError
from mmedit_cli.patch import Patch
from mmedit_cli.types import Concept

_KEY = "router_key"
Block = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class MultiMeloDiffusionHparams(SubjectHparams):
    """See hparams/multi_melo_diffusion.yaml for what each value means and where it comes from."""

    learning_rate: float = 5.5e-5
    rank: int = 8
    scale: float = 0.6
    unet_targets: tuple[str, ...] = ("q", "v")
    text_targets: tuple[str, ...] = ("q", "v")
    router: Literal["token", "embedding", "always"] = "token"
    named_by: Literal["identifier", "subject"] = "identifier"
    threshold: float = 0.95
    several: Literal["beside", "sum"] = "beside"
    cfg_route: Literal["both", "cond_only"] = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank <= 0:
            raise ValueError(f"rank must be above 0, not {self.rank}")


class MultiMeloDiffusion(Personalizer):
    """A LoRA block a subject in the UNet and the text encoders (Multi-MELO), chosen by the prompt.

    A prompt that names no subject is drawn as by the base model, bit for bit. One that names several is drawn in as
    many windows beside each other, each with a block, or gets the sum of their blocks. For ablations `router: always`
    puts all blocks on every prompt, and `give` decides in the place of the router.
    """

    name = "multi-melo-diffusion"
    Hparams = MultiMeloDiffusionHparams
    routes = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._given: dict[str, list[str]] = {}
        self._patch = Patch(self.model.model)
        self._blocks: dict[str, Block] = {}
        self._keys: dict[str, Tensor] = {}
        self._names: dict[str, list[int]] = {}
        self._trie = TokenTrie()
        self._router, self._scale = (
            self.hparams.router,
            1.0,
        )  # other than these while a block is learned
        self._seen: Tokens | None = None
        self._routed: dict[tuple[str, ...], Tensor] = {}

    @property
    def steps(self) -> int:
        """The optimiser's steps."""
        return int(self.hparams.steps)

    @property
    def targets(self) -> list[str]:
        """The paths of the projections that every block changes."""
        hp = self.hparams
        return self.model.attention(
            hp.unet_targets, text=hp.text_targets if hp.train_text_encoder else ()
        )

    # -- routing ------------------------------------------------------------------------------------------------

    def route(self, prompts: Sequence[str]) -> list[list[str]]:
        """Return the tokens of the concepts whose blocks each prompt gets, all windows of its picture together."""
        told = [
            (i, text)
            for i, prompt in enumerate(prompts)
            for text in self.model.window_prompts(prompt)
        ]
        found: list[list[str]] = [[] for _ in prompts]
        for (i, _), tokens in zip(
            told,
            self._route(self.model.tokenize([text for _, text in told])),
            strict=True,
        ):
            found[i] += [token for token in tokens if token not in found[i]]
        return found

    def _route(self, tokens: Tokens) -> list[list[str]]:
        count = int(tokens.unconditional.sum())
        if self._router == "none":
            wanted: list[list[str]] = [[] for _ in tokens.prompts[count:]]
        elif self._router == "always":
            wanted = [list(self._blocks)] * (len(tokens.prompts) - count)
        elif self._router == "embedding":
            wanted = self._by_embedding(tokens, count)
        else:
            wanted = [self._trie.find(ids) for ids in tokens.ids[0][count:].tolist()]
        if self._router != "none":
            told = zip(tokens.prompts[count:], wanted, strict=True)
            wanted = [self._given.get(prompt, found) for prompt, found in told]
        if not count:
            return wanted
        return [
            *(wanted if self.hparams.cfg_route == "both" else [[]] * count),
            *wanted,
        ]

    def _by_embedding(self, tokens: Tokens, count: int) -> list[list[str]]:
        names = list(self._keys)
        keys = torch.stack(list(self._keys.values())) if names else torch.empty(0, 0)
        found = nearest(
            self._embed(tokens.prompts[count:]), keys, self.hparams.threshold
        )
        return [[] if i is None else [names[i]] for i in found]

    @torch.no_grad()
    def _embed(self, prompts: Sequence[str]) -> Tensor:
        """Return what the untouched text encoders say of prompts: (B, D)."""
        router, self._router, self._seen = self._router, "none", None
        try:
            tokens = self.model.tokenize(prompts)
            return mean_encoding(self.model.encode(tokens).hidden, tokens.lengths)
        finally:
            self._router, self._seen = router, None

    def _rows(self, rows: int) -> dict[tuple[str, ...], Tensor]:
        """Return which of the current rows get which blocks; decided once for the tokens, whatever layer asks."""
        tokens = self.model.rows(rows).tokens
        if tokens is not self._seen:
            routes = [tuple(route) for route in self._route(tokens)]
            where = {
                some: [i for i, other in enumerate(routes) if other == some]
                for some in dict.fromkeys(routes)
                if some
            }
            self._routed = {
                key: torch.tensor(which, device=self.model.device)
                for key, which in where.items()
            }
            self._seen = tokens
        return self._routed

    def give(self, blocks: Mapping[str, Sequence[str]]) -> None:
        """Say for some prompts which tokens' blocks they get, whatever the router says; nothing for nothing.

        A window of such a prompt's picture gets the block of its own subject, if that is among them.
        """
        self._given = {}
        for prompt, tokens in blocks.items():
            for told in self.model.window_prompts(prompt):
                self._given[told] = [token for token in tokens if token in told]
            self._given[prompt] = list(tokens)

    def windows(self, prompt: str) -> list[str]:
        """Return what each window of a prompt's picture is told: the subject alone, in the words around them all.

        "a <dog> and a <cat> on a beach" is "a <dog> on a beach" beside "a <cat> on a beach".
        """
        found = [
            match
            for match in re.finditer(r"<[^<>\s]+>", prompt)
            if match[0] in self._blocks
        ]
        subjects = dict.fromkeys(match[0] for match in found)
        if len(subjects) < 2:
            return [prompt]
        return [
            prompt[: found[0].start()] + subject + prompt[found[-1].end() :]
            for subject in subjects
        ]

    # -- drawing ------------------------------------------------------------------------------------------------

    def _attach(self, learned: Learned) -> None:
        tensors = dict(learned.tensors)
        key = tensors.pop(_KEY, None)
        if (
            key is None
            or key.shape != (self.model.width,)
            or "identifier" not in learned.facts
        ):
            raise StateError(f"{learned.token}: what the router needs is missing")
        blocks = lora_files.pairs(tensors)
        shapes = {
            path: self.model.model.get_submodule(path).weight.shape
            for path in self.targets
        }
        lora_files.check_fits(blocks, shapes, learned.token)
        device = self.model.device
        self._name(learned.token, learned.facts["identifier"], learned.superclass)
        self._keys[learned.token] = key.to(device, torch.float32)
        self._blocks[learned.token] = {
            path: (a.to(device), b.to(device)) for path, (a, b) in blocks.items()
        }
        self._hook()

    def _detach(self, token: str) -> None:
        for table in (self._blocks, self._keys, self._names, self.model.words):
            del table[token]
        self._hook()

    def _hook(self) -> None:
        """Hook the projections anew, if there is a block at all, and learn the names of those that are there."""
        self._patch.undo()
        self.model.windows = (
            self.windows if self._blocks and self.hparams.several == "beside" else None
        )
        self._seen, self._trie = None, TokenTrie()
        for token, ids in self._names.items():
            self._trie.insert(ids, token)
        if self._blocks:
            for path in self.targets:
                self._patch.hook_call(path, self._change(path))

    def _name(self, token: str, name: str, superclass: str) -> None:
        """Let a token stand for an identifier and its superclass, by which the router will know it."""
        self.model.words[token] = word_for(name, superclass)
        spelled = (
            name if self.hparams.named_by == "identifier" else f"{name} {superclass}"
        )
        self._names[token] = self.model.tokenizers[0](
            spelled, add_special_tokens=False
        )["input_ids"]

    def _change(self, path: str) -> Callable[[Tensor, Tensor], Tensor | None]:
        def change(inputs: Tensor, output: Tensor) -> Tensor | None:
            for names, rows in self._rows(len(inputs)).items():
                some = inputs[rows]
                for name in names:
                    down, up = self._blocks[name][path]
                    added = (some.to(down.dtype) @ down.T) @ up.T * self._scale
                    output = output.index_add(0, rows, added.to(output.dtype))
            return output

        return change

    # -- learning -----------------------------------------------------------------------------------------------

    def _learn(self, concept: Concept, source: Generator, tick: Tick) -> Learned:
        hp, model = self.hparams, self.model
        name = hp.identifier or identifier(
            model.tokenizers[0], concept.token, self.identifiers
        )
        lesson = SubjectLesson(model, concept, hp, source, name)
        key = self._embed([lesson.prompts[0]])[0]
        block = {path: self._fresh(path, source) for path in self.targets}
        parameters = [parameter for pair in block.values() for parameter in pair]
        self._name(concept.token, name, concept.superclass)
        self._blocks = {concept.token: block}  # type: ignore[dict-item]
        # rows of prior preservation do not name the subject, so this router leaves them alone
        self._router, self._scale = "token", hp.scale
        try:
            self._hook()
            losses = lesson.run(
                parameters,
                tick,
                text=any(not path.startswith("unet.") for path in block),
            )
        finally:
            self._router, self._scale = hp.router, 1.0
            self._blocks, self._names = {}, {}
            del model.words[concept.token]
            self._hook()
        tensors = {_KEY: key.cpu(), **lora_files.tensors_of(block, hp.scale)}
        return Learned(
            concept.token,
            concept.superclass,
            tensors,
            {"identifier": name},
            summary(losses),
        )

    def _fresh(self, path: str, source: Generator) -> tuple[nn.Parameter, nn.Parameter]:
        """Return A (r, in), uniform within 1 / sqrt(r), and B (out, r), zero: a block that changes nothing yet."""
        outputs, inputs = self.model.model.get_submodule(path).weight.shape
        down = (
            torch.rand(self.hparams.rank, inputs, generator=source) * 2 - 1
        ) * self.hparams.rank**-0.5
        up = torch.zeros(outputs, self.hparams.rank)
        return nn.Parameter(down.to(self.model.device)), nn.Parameter(
            up.to(self.model.device)
        )

    def export(self, token: str, path: Path) -> None:
        """Write a block as a LoRA file of diffusers; the subject is called by `facts["identifier"]` there."""
        tensors = {
            key: tensor
            for key, tensor in self.concepts[token].tensors.items()
            if key != _KEY
        }
        lora_files.export(path, tensors)


PERSONALIZER = MultiMeloDiffusion
