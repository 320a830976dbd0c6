"""Multi-MELO for diffusion: a LoRA block a subject, all in one model, and a router that reads the prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

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
from mmedit_cli.drawing.models.prompts import Tokens, Word
from mmedit_cli.errors import StateError
from mmedit_cli.patch import Patch
from mmedit_cli.types import Concept

_KEY = "router_key"
_VECTORS = "embedding."  # and the number of the text encoder, where a word of others has vectors
_ADOPTED = "adopted"  # the fact that a concept was made elsewhere: what it is made of
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
            for route, prompt in zip(routes, prompts, strict=True):
                # a word with vectors of its own is no identifier that ids could show
                route += [token for token in self._with_vectors() if token in prompt]
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

    def _with_vectors(self) -> list[str]:
        """The tokens of blocks whose word has vectors of its own."""
        words = self.model.words
        return [
            token for token, b in self._blocks.items() if b and words[token].vectors
        ]

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
        vectors = self._vectors_among(tensors, token)
        pairs = lora_files.pairs(tensors)
        paths = list(pairs) if _ADOPTED in learned.facts else self.targets
        shapes = {path: self._weight_shape(path) for path in paths}
        lora_files.check_fits(pairs, shapes, token)
        device = self.model.device
        if vectors:
            self.model.words[token] = Word(learned.superclass, vectors)
        else:
            self._add_name(token, name, learned.superclass)
        self._keys[token] = key.to(device, torch.float32)
        block = {}
        for path, (down, up) in pairs.items():
            block[path] = (down.to(device), up.to(device))
        self._blocks[token] = block
        self._hook()

    def _vectors_among(
        self, tensors: dict[str, Tensor], token: str
    ) -> tuple[Tensor, ...]:
        """Take the vectors of a word out of the tensors of a concept; () if its word has none."""
        names = sorted(name for name in tensors if name.startswith(_VECTORS))
        if not names:
            return ()
        vectors = tuple(tensors.pop(name).to(self.model.device) for name in names)
        encoders = self.model.text_encoders
        widths = [e.get_input_embeddings().embedding_dim for e in encoders]
        if [rows.shape[-1] for rows in vectors] != widths:
            raise StateError(f"{token}: its vectors do not fit {self.model.name}")
        return vectors

    def _detach(self, token: str) -> None:
        for table in (self._blocks, self._keys, self.model.words):
            del table[token]
        self._names.pop(token, None)
        self._hook()

    def _hook(self) -> None:
        """Hook the projections again if there is a block, and give the router the names of all blocks."""
        self._patch.undo()
        beside = self.model.in_windows and self.hparams.several == "beside"
        in_windows = self._blocks and beside
        self.model.windows = self.windows if in_windows else None
        self._routed_tokens = None
        self._trie = TokenTrie()
        for token, ids in self._names.items():
            self._trie.insert(ids, token)
        for path in dict.fromkeys(chain.from_iterable(self._blocks.values())):
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
        try:
            weight = self.model.model.get_parameter(f"{path}.weight")
        except AttributeError as error:
            raise StateError(f"{path}: no such layer in {self.model.name}") from error
        return tuple(weight.shape)

    def _add_blocks(self, path: str) -> Callable[[Tensor, Tensor], Tensor | None]:
        """Return the hook of one projection: it adds B A x of a row's blocks to W x."""

        def add(inputs: Tensor, output: Tensor) -> Tensor | None:
            routed = self._rows(len(inputs))
            for names, rows in routed.items():
                some = inputs[rows]
                for name in names:
                    pair = self._blocks[name].get(path)
                    if pair is None:  # a block of others changes other layers
                        continue
                    added = self._low_rank(path, some, *pair) * self._scale
                    output = output.index_add(
                        0,
                        rows,
                        added.to(output.dtype),
                    )
            return output

        return add

    def _low_rank(self, path: str, inputs: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """Return B A x for what a linear layer or a convolution reads."""
        numbers = inputs.to(down.dtype)
        if down.dim() == 2:
            return numbers @ down.T @ up.T
        layer: Any = self.model.model.get_submodule(path)
        read = F.conv2d(
            numbers,
            down,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
        )
        return F.conv2d(read, up)

    # -- blocks of others ---------------------------------------------------------------------------------------

    def adopt(
        self,
        token: str,
        superclass: str,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        vectors: Sequence[Tensor] = (),
    ) -> LearnedConcept:
        """Put a LoRA that was made elsewhere into the model as a block, its token a word with `vectors`, if any.

        `factors` are A (r, in, ...) and B (out, r, ...) by the path of any layer. Without vectors the token stands for
        the identifier and the superclass. Raises StateError for a token that is taken, or for what does not fit.
        """
        hp = self.hparams
        self._check_free(token)
        name = hp.identifier or identifier(
            self.model.tokenizers[0], token, self.identifiers
        )
        (key,) = self._embed([hp.template.format(f"{name} {superclass}")])
        tensors = {_KEY: key.cpu(), **lora_files.tensors_of(factors)}
        for i, rows in enumerate(vectors):
            tensors[f"{_VECTORS}{i}"] = rows.cpu().contiguous()
        facts = {"identifier": name, _ADOPTED: "1"}
        learned = LearnedConcept(token, superclass, tensors, facts)
        self.add(learned)
        return learned

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
            trains_text = any(path.startswith("text_encoder") for path in block)
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
        tensors = {}
        for name, tensor in self.concepts[token].tensors.items():
            if name != _KEY and not name.startswith(_VECTORS):
                tensors[name] = tensor
        if not tensors:
            raise StateError(
                f"{token}: an embedding of others, no LoRA",
                "its own file is what other programs read",
            )
        lora_files.export(path, tensors)


PERSONALIZER = MultiMeloDiffusion
