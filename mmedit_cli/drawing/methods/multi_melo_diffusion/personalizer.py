"""Multi-MELO for diffusion: a LoRA block a subject, all in one model, and a router that reads the prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from mmedit_cli.drawing.methods.base import LearnedConcept, Personalizer, Tick, summary
from mmedit_cli.drawing.methods.multi_melo_diffusion.routing import (
    TokenTrie,
    mean_encoding,
    nearest,
)
from mmedit_cli.drawing.methods.shared import lora_files
from mmedit_cli.drawing.methods.shared.subject_training import (
    SubjectHparams,
    SubjectTraining,
    identifier,
    word_for,
)
from mmedit_cli.drawing.models.prompts import Tokens
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
    """One LoRA block for each subject in the UNet and the text encoders (Multi-MELO), chosen by the prompt.

    A prompt that names no subject is drawn as by the base model, bit for bit. A prompt that names several subjects is
    drawn in one window for each of them, with its block, or gets the sum of their blocks. For ablations,
    `router: always` puts all blocks on every prompt, and `assign_blocks` overrides the router.
    """

    name = "multi-melo-diffusion"
    Hparams = MultiMeloDiffusionHparams
    routes = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hp = self.hparams
        self._assigned: dict[str, list[str]] = {}
        self._patch = Patch(self.model.model)
        self._blocks: dict[str, Block] = {}
        self._keys: dict[str, Tensor] = {}
        self._names: dict[str, list[int]] = {}
        self._trie = TokenTrie()
        # While a block is learned, the router is another one and the scale is that of the hyper-parameters.
        self._router = hp.router
        self._scale = 1.0
        self._routed_tokens: Tokens | None = None
        self._routed_rows: dict[tuple[str, ...], Tensor] = {}

    @property
    def steps(self) -> int:
        """The optimiser's steps."""
        return int(self.hparams.steps)

    @property
    def targets(self) -> list[str]:
        """The paths of the projections that every block changes."""
        hp = self.hparams
        text_targets = hp.text_targets if hp.train_text_encoder else ()
        return self.model.attention(hp.unet_targets, text=text_targets)

    # -- routing ------------------------------------------------------------------------------------------------

    def route(self, prompts: Sequence[str]) -> list[list[str]]:
        """Return the tokens of the concepts whose blocks each prompt gets, in all windows of its picture."""
        texts = []
        owners = []
        for i, prompt in enumerate(prompts):
            for text in self.model.window_prompts(prompt):
                texts.append(text)
                owners.append(i)
        routes = self._route(self.model.tokenize(texts))
        by_prompt: list[list[str]] = [[] for _ in prompts]
        for i, tokens in zip(owners, routes, strict=True):
            by_prompt[i] += [token for token in tokens if token not in by_prompt[i]]
        return by_prompt

    def _route(self, tokens: Tokens) -> list[list[str]]:
        """Return the tokens of the blocks that each row gets, those of classifier-free guidance first."""
        unguided_rows = int(tokens.unconditional.sum())
        prompts = tokens.prompts[unguided_rows:]
        if self._router == "none":
            routes: list[list[str]] = [[] for _ in prompts]
        else:
            routes = self._choose(prompts, tokens.ids[0][unguided_rows:].tolist())
        if not unguided_rows:
            return routes
        if self.hparams.cfg_route == "both":
            return routes + routes
        return [[]] * unguided_rows + routes

    def _choose(
        self, prompts: Sequence[str], ids: Sequence[Sequence[int]]
    ) -> list[list[str]]:
        """Ask the router; a prompt of `assign_blocks` gets its assigned blocks."""
        if self._router == "always":
            routes = [list(self._blocks) for _ in prompts]
        elif self._router == "embedding":
            routes = self._choose_by_embedding(prompts)
        else:
            routes = [self._trie.find(row) for row in ids]
        for i, prompt in enumerate(prompts):
            routes[i] = self._assigned.get(prompt, routes[i])
        return routes

    def _choose_by_embedding(self, prompts: Sequence[str]) -> list[list[str]]:
        embeddings = self._embed(prompts)
        names = list(self._keys)
        keys = torch.empty(0, 0)
        if names:
            keys = torch.stack(list(self._keys.values()))
        routes = []
        indices = nearest(embeddings, keys, self.hparams.threshold)
        for i in indices:
            routes.append([] if i is None else [names[i]])
        return routes

    @torch.no_grad()
    def _embed(self, prompts: Sequence[str]) -> Tensor:
        """Return the mean encodings (B, D) of prompts by the text encoders without any block."""
        router = self._router
        self._router = "none"
        self._routed_tokens = None
        try:
            tokens = self.model.tokenize(prompts)
            encoding = self.model.encode(tokens)
            return mean_encoding(encoding.hidden, tokens.lengths)
        finally:
            self._router = router
            self._routed_tokens = None

    def _rows(self, count: int) -> dict[tuple[str, ...], Tensor]:
        """Return the rows of the current pass that get the same blocks; decided once, whatever layer asks first."""
        tokens = self.model.rows(count).tokens
        if tokens is self._routed_tokens:
            return self._routed_rows
        rows: dict[tuple[str, ...], list[int]] = {}
        for row, route in enumerate(self._route(tokens)):
            if route:
                rows.setdefault(tuple(route), []).append(row)
        device = self.model.device
        self._routed_rows = {}
        for names, numbers in rows.items():
            self._routed_rows[names] = torch.tensor(numbers, device=device)
        self._routed_tokens = tokens
        return self._routed_rows

    def assign_blocks(self, blocks: Mapping[str, Sequence[str]]) -> None:
        """Give some prompts the blocks of these tokens, whatever the router says; an empty mapping ends that.

        A window of such a prompt gets the block of its own subject, if that is among them.
        """
        self._assigned = {}
        for prompt, tokens in blocks.items():
            for text in self.model.window_prompts(prompt):
                named = [token for token in tokens if token in text]
                self._assigned[text] = named
            self._assigned[prompt] = list(tokens)

    def windows(self, prompt: str) -> list[str]:
        """Return the prompt of each window of a picture: one subject alone, with the words around all of them.

        "a <dog> and a <cat> on a beach" becomes "a <dog> on a beach" and "a <cat> on a beach".
        """
        matches = []
        for match in re.finditer(r"<[^<>\s]+>", prompt):
            if match[0] in self._blocks:
                matches.append(match)
        subjects = dict.fromkeys(match[0] for match in matches)
        if len(subjects) < 2:
            return [prompt]
        before = prompt[: matches[0].start()]
        behind = prompt[matches[-1].end() :]
        return [before + subject + behind for subject in subjects]

    # -- drawing ------------------------------------------------------------------------------------------------

    def _attach(self, learned: LearnedConcept) -> None:
        token = learned.token
        tensors = dict(learned.tensors)
        key = tensors.pop(_KEY, None)
        name = learned.facts.get("identifier")
        if key is None or key.shape != (self.model.width,) or name is None:
            raise StateError(f"{token}: what the router needs is missing")
        pairs = lora_files.pairs(tensors)
        shapes = {path: self._weight_shape(path) for path in self.targets}
        lora_files.check_fits(pairs, shapes, token)
        device = self.model.device
        self._add_name(token, name, learned.superclass)
        self._keys[token] = key.to(device, torch.float32)
        block = {}
        for path, (down, up) in pairs.items():
            block[path] = (down.to(device), up.to(device))
        self._blocks[token] = block
        self._hook()

    def _detach(self, token: str) -> None:
        for table in (self._blocks, self._keys, self._names, self.model.words):
            del table[token]
        self._hook()

    def _hook(self) -> None:
        """Hook the projections again if there is a block, and give the router the names of all blocks."""
        self._patch.undo()
        in_windows = self._blocks and self.hparams.several == "beside"
        self.model.windows = self.windows if in_windows else None
        self._routed_tokens = None
        self._trie = TokenTrie()
        for token, ids in self._names.items():
            self._trie.insert(ids, token)
        if self._blocks:
            for path in self.targets:
                self._patch.hook_call(path, self._add_blocks(path))

    def _add_name(self, token: str, name: str, superclass: str) -> None:
        """Let a token stand for an identifier and its superclass; the router finds it by their token ids."""
        word = word_for(name, superclass)
        self.model.words[token] = word
        by_identifier = self.hparams.named_by == "identifier"
        text = name if by_identifier else word.text
        tokenizer = self.model.tokenizers[0]
        encoded = tokenizer(text, add_special_tokens=False)
        self._names[token] = encoded["input_ids"]

    def _weight_shape(self, path: str) -> tuple[int, ...]:
        weight: Any = self.model.model.get_submodule(path).weight
        return tuple(weight.shape)

    def _add_blocks(self, path: str) -> Callable[[Tensor, Tensor], Tensor | None]:
        """Return the hook of one projection: it adds B A x of a row's blocks to W x."""

        def add(inputs: Tensor, output: Tensor) -> Tensor | None:
            routed = self._rows(len(inputs))
            for names, rows in routed.items():
                some = inputs[rows]
                for name in names:
                    down, up = self._blocks[name][path]
                    low_rank = some.to(down.dtype) @ down.T
                    added = low_rank @ up.T * self._scale
                    output = output.index_add(
                        0,
                        rows,
                        added.to(output.dtype),
                    )
            return output

        return add

    # -- learning -----------------------------------------------------------------------------------------------

    def _learn(self, concept: Concept, source: Generator, tick: Tick) -> LearnedConcept:
        hp, model = self.hparams, self.model
        name = hp.identifier or identifier(
            model.tokenizers[0], concept.token, self.identifiers
        )
        training = SubjectTraining(model, concept, hp, source, name)
        (key,) = self._embed([training.prompts[0]])
        parameters = []
        block: Block = {}
        for path in self.targets:
            down, up = self._initial_pair(path, source)
            parameters += [down, up]
            block[path] = (down, up)
        self._add_name(concept.token, name, concept.superclass)
        self._blocks = {concept.token: block}
        # Rows of prior preservation do not name the subject, so the token router leaves them alone.
        self._router = "token"
        self._scale = hp.scale
        try:
            self._hook()
            trains_text = any(not path.startswith("unet.") for path in block)
            losses = training.run(parameters, tick, text=trains_text)
        finally:
            self._router = hp.router
            self._scale = 1.0
            self._blocks = {}
            self._names = {}
            del model.words[concept.token]
            self._hook()
        tensors = {_KEY: key.cpu(), **lora_files.tensors_of(block, hp.scale)}
        return LearnedConcept(
            concept.token,
            concept.superclass,
            tensors,
            {"identifier": name},
            summary(losses),
        )

    def _initial_pair(
        self, path: str, source: Generator
    ) -> tuple[nn.Parameter, nn.Parameter]:
        """Return A (r, in), uniform within 1 / sqrt(r), and B (out, r), zero: a block that changes nothing yet."""
        outputs, inputs = self._weight_shape(path)
        rank = self.hparams.rank
        device = self.model.device
        uniform = torch.rand(rank, inputs, generator=source) * 2 - 1
        down = uniform * rank**-0.5
        up = torch.zeros(outputs, rank)
        return (
            nn.Parameter(down.to(device)),
            nn.Parameter(up.to(device)),
        )

    def export(self, token: str, path: Path) -> None:
        """Write a block as a LoRA file of diffusers; the subject is called by `facts["identifier"]` there."""
        tensors = dict(self.concepts[token].tensors)
        del tensors[_KEY]
        lora_files.export(path, tensors)


PERSONALIZER = MultiMeloDiffusion
