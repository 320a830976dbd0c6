"""The language model of MGIE: what it says an edited picture will look like, and the states of its visual tokens.

A sequence is [prompt with the picture | expressive instruction | IMG0 ... IMG7 | end], padded on the left, so that the
visual tokens of all rows stand in the same columns. They are put there as embeddings: there are exactly eight in a
row, however long the text is, and no tokenizer can put anything between them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import DynamicCache

from mmedit_cli.errors import DataError, ModelError
from mmedit_cli.knowledge.models.shared.generation import set_aside
from mmedit_cli.picture_editing.methods.mgie.modules import N_TOKENS, VisualTokens

PROMPT = "USER: <image>\nwhat will this image be like if '{instruction}' ASSISTANT:"  # LLaVA-1.5's format
BRIEFLY = " (in at most 32 words)"  # behind the instruction, where the model was not taught to be brief
IGNORE = -100


@dataclass(frozen=True)
class Written:
    """An expressive instruction and who it is from: model, user, or fallback where the model said nothing."""

    text: str
    source: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A prompt and an expressive instruction as embeddings (T, D) and ids (T,), of which `n_prompt` are asked."""

    embeddings: Tensor
    ids: Tensor
    n_prompt: int


@dataclass(frozen=True)
class States:
    """The last hidden states (B, T + 8, D) of a batch whose visual tokens begin in column `start` (= T)."""

    hidden: Tensor
    mask: Tensor
    start: int

    @property
    def visual(self) -> Tensor:
        """The states that predict IMG0 ... IMG7, (B, 8, D): those one column before each (as published)."""
        return self.hidden[:, self.start - 1 : self.start - 1 + N_TOKENS]


class Guide:
    """A LLaVA with visual tokens beside its vocabulary."""

    def __init__(
        self, mllm: Any, processor: Any, tokens: VisualTokens, prompt: str = PROMPT
    ) -> None:
        self.mllm, self.tokens = mllm, tokens
        self.tokenizer, self.image_processor = (
            processor.tokenizer,
            processor.image_processor,
        )
        self.prompt = prompt or PROMPT
        self._image_id: int = mllm.config.image_token_id
        self._placeholder = self.tokenizer.convert_ids_to_tokens(self._image_id)
        if self.prompt.count("<image>") != 1 or self.prompt.count("{instruction}") != 1:
            raise ModelError(
                f"prompt {self.prompt!r}: needs <image> and {{instruction}}, once each"
            )
        self.n_vocabulary: int = mllm.get_output_embeddings().weight.shape[0]
        self.max_length: int = mllm.config.get_text_config().max_position_embeddings

    @property
    def device(self) -> torch.device:
        """Where the embeddings are."""
        return self._embedding.weight.device  # type: ignore[no-any-return]

    @property
    def _embedding(self) -> Any:
        return self.mllm.get_input_embeddings()

    # -- text to rows -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """Return the image tokens of pictures: (N_v, D) each."""
        inputs = self.image_processor(images=list(pictures), return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.device, self.mllm.dtype)
        return list(
            self.mllm.get_image_features(pixels, return_dict=True).pooler_output
        )

    def token_ids(
        self, instruction: str, expressive: str | None, n_image: int
    ) -> tuple[list[int], int]:
        """Return (ids, how many are the prompt's) with `n_image` placeholders for the picture.

        Raises DataError for an instruction that is too long or holds the placeholder itself.
        """
        for text in (instruction, expressive or ""):
            if self._placeholder in text or "<image>" in text:
                raise DataError(
                    f"{text!r}: {self._placeholder} stands for the picture",
                    "leave it out",
                )
        before, _, after = self.prompt.replace("{instruction}", instruction).partition(
            "<image>"
        )
        texts = [before + self._placeholder + after]
        texts += [f"{texts[0]} {expressive}"] if expressive else []
        lists = []
        for ids in self.tokenizer(texts)["input_ids"]:
            at = ids.index(self._image_id)
            lists.append(ids[:at] + [self._image_id] * n_image + ids[at + 1 :])
        if len(lists[0]) >= self.room:
            raise DataError(
                f"{instruction[:80]!r} takes {len(lists[0])} tokens with its picture; the model reads {self.room - 1}",
                "say it shorter",
            )
        return lists[-1][: self.room], min(len(lists[0]), len(lists[-1]))

    @property
    def room(self) -> int:
        """How many tokens a prompt and its expressive instruction may take; what is longer is cut."""
        return self.max_length - N_TOKENS - 1

    def rows(
        self,
        features: Sequence[Tensor],
        instructions: Sequence[str],
        expressive: Sequence[str | None],
    ) -> list[Row]:
        """Return the rows of some pictures' features with their texts; None asks for the prompt alone."""
        found = []
        for tokens, instruction, text in zip(
            features, instructions, expressive, strict=True
        ):
            listed, n_prompt = self.token_ids(instruction, text, len(tokens))
            ids = torch.tensor(listed, device=self.device)
            embeddings = self._embedding(ids)
            place = (ids == self._image_id)[:, None]
            found.append(
                Row(
                    embeddings.masked_scatter(place, tokens.to(embeddings.dtype)),
                    ids,
                    n_prompt,
                )
            )
        return found

    # -- what the model says ------------------------------------------------------------------------------------

    @torch.no_grad()
    def write(
        self,
        pictures: Sequence[Image.Image],
        instructions: Sequence[str],
        *,
        longest: int = 64,
        briefly: bool = False,
    ) -> list[Written]:
        """Return what the model says the edited pictures will look like: greedy, up to its end or IMG0.

        `briefly` asks for few words, for a model that was not trained to use few. Never empty: where the model says
        nothing, the instruction stands for itself.
        """
        from transformers import GenerationConfig

        asked = [text + BRIEFLY * briefly for text in instructions]
        rows = self.rows(self.features(pictures), asked, [None] * len(asked))
        embeddings, mask = padded(rows)
        limits = [
            min(longest, self.room - len(row.ids)) for row in rows
        ]  # of each alone: company does not matter
        ends = {self.tokenizer.eos_token_id, self.n_vocabulary}
        pad = self.tokenizer.pad_token_id
        config = GenerationConfig(
            max_new_tokens=max(limits),
            do_sample=False,
            eos_token_id=sorted(ends),
            pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
            suppress_tokens=[
                self._image_id,
                *range(self.n_vocabulary + 1, self.n_vocabulary + N_TOKENS),
            ],
        )

        def widen(_module: Any, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
            return torch.cat([logits, self._visual_logits(inputs[0])], -1)

        def narrow(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (
                inputs[0].clamp(max=self.n_vocabulary - 1),
            )  # IMG0 of a row that ended while others go on

        handles = [
            self.mllm.get_output_embeddings().register_forward_hook(widen),
            self._embedding.register_forward_pre_hook(narrow),
        ]
        try:
            with set_aside(self.mllm):
                out = self.mllm.generate(
                    inputs_embeds=embeddings,
                    attention_mask=mask,
                    generation_config=config,
                )
        finally:
            for handle in handles:
                handle.remove()
        said = [ids[:limit] for ids, limit in zip(out.tolist(), limits, strict=True)]
        return [
            self._written(ids, text, ends)
            for ids, text in zip(said, instructions, strict=True)
        ]

    def _written(self, ids: list[int], instruction: str, ends: set[int]) -> Written:
        stop = next((i for i, token in enumerate(ids) if token in ends), None)
        text = clean(self.tokenizer.decode(ids[:stop], skip_special_tokens=True))
        if not text:
            return Written(
                instruction,
                "fallback",
                ("the model said nothing: the instruction stands for itself",),
            )
        cut = (
            ()
            if stop is not None
            else (f"the expressive instruction was cut after {len(ids)} tokens",)
        )
        return Written(text, "model", cut)

    # -- states and logits --------------------------------------------------------------------------------------

    def states(self, rows: Sequence[Row], *, frozen_prefix: bool = False) -> States:
        """Return the last hidden states of rows with the visual tokens behind them.

        With `frozen_prefix`, what precedes the visual tokens is run without gradients and only they are run with
        them: equal, if no parameter that the prefix depends on is trained, and far cheaper.
        """
        embeddings, mask = padded(rows)
        visual = self.tokens.embed.to(embeddings.dtype).expand(len(rows), -1, -1)
        whole = torch.cat([mask, mask.new_ones(len(rows), N_TOKENS)], dim=1)
        positions = (whole.cumsum(1) - 1).clamp(min=0)
        stack, start = self.mllm.get_decoder(), embeddings.shape[1]
        if not frozen_prefix:
            out = stack(
                inputs_embeds=torch.cat([embeddings, visual], 1), attention_mask=whole, position_ids=positions,
                use_cache=False,
            )  # fmt: skip
            return States(out.last_hidden_state, whole, start)
        cache = {cache_argument(stack): DynamicCache(config=stack.config)}
        with torch.no_grad():
            prefix = stack(
                inputs_embeds=embeddings,
                attention_mask=mask,
                position_ids=positions[:, :start],
                use_cache=True,
                **cache,
            )
        tail = stack(
            inputs_embeds=visual,
            attention_mask=whole,
            position_ids=positions[:, start:],
            use_cache=True,
            **cache,
        )
        return States(
            torch.cat([prefix.last_hidden_state, tail.last_hidden_state], 1),
            whole,
            start,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V + 8) of hidden states (..., D), the visual tokens behind the vocabulary."""
        head = self.mllm.get_output_embeddings()
        return torch.cat([head(hidden), self._visual_logits(hidden)], -1)

    def _visual_logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.tokens.unembed.to(hidden.dtype).T

    def labels(self, rows: Sequence[Row], *, visual_only: bool = False) -> Tensor:
        """Return what each column of `states` should predict, (B, T + 8): -100 for what was asked, and for padding.

        The visual tokens come behind the expressive instruction, and the end behind them; with `visual_only`, nothing
        but these counts.
        """
        longest = max(len(row.ids) for row in rows)
        labels = torch.full((len(rows), longest + N_TOKENS), IGNORE, device=self.device)
        visual = torch.arange(
            self.n_vocabulary, self.n_vocabulary + N_TOKENS, device=self.device
        )
        labels[:, longest - 1 : longest - 1 + N_TOKENS] = visual
        labels[:, -1] = self.tokenizer.eos_token_id
        if not visual_only:
            for i, row in enumerate(rows):
                said = row.ids[row.n_prompt :]
                labels[i, longest - 1 - len(said) : longest - 1] = said
        return labels


def cache_argument(decoder: nn.Module) -> str:
    """Return what a decoder calls the argument for its cache: `cache` since transformers 5.24."""
    known = inspect.signature(decoder.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def padded(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Return rows as one batch, padded on the left: embeddings (B, T, D) and mask (B, T)."""
    longest = max(len(row.ids) for row in rows)
    first = rows[0].embeddings
    mask = torch.zeros(len(rows), longest, dtype=torch.long, device=first.device)
    parts = []
    for i, row in enumerate(rows):
        room = longest - len(row.ids)
        mask[i, room:] = 1
        parts.append(torch.cat([first.new_zeros(room, first.shape[1]), row.embeddings]))
    return torch.stack(parts), mask


def clean(text: str) -> str:
    """Return a text in one line, without what a chat puts around it."""
    for mark in ("ASSISTANT:", "</s>"):
        text = text.replace(mark, " ")
    return " ".join(text.split())
