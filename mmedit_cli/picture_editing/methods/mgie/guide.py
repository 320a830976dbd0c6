"""The language model of MGIE: it describes the edited picture, and gives the states of its visual tokens.

A sequence is [prompt with the picture | expressive instruction | IMG0 ... IMG7 | end], padded on the left, so that the
visual tokens of all rows stand in the same columns. They are inserted as embeddings: there are exactly eight in a row,
however long the text is, and no tokenizer can put anything between them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
class ExpressiveInstruction:
    """An expressive instruction and its source: model, user, or fallback if the model said nothing."""

    text: str
    source: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class GuideInput:
    """A prompt and an expressive instruction as embeddings (T, D) and ids (T,); `n_prompt` of them are the prompt."""

    embeddings: Tensor
    ids: Tensor
    n_prompt: int


@dataclass(frozen=True)
class HiddenStates:
    """The last hidden states (B, T + 8, D) of a batch whose visual tokens begin in column `start` (= T)."""

    hidden: Tensor
    mask: Tensor
    start: int

    @property
    def visual(self) -> Tensor:
        """The states that predict IMG0 ... IMG7, (B, 8, D): those one column before each (as published)."""
        first = self.start - 1
        return self.hidden[:, first : first + N_TOKENS]


class Guide:
    """A LLaVA with visual tokens beside its vocabulary."""

    def __init__(
        self, mllm: Any, processor: Any, tokens: VisualTokens, prompt: str = PROMPT
    ) -> None:
        self.mllm = mllm
        self.tokens = tokens
        self.tokenizer = processor.tokenizer
        self.image_processor = processor.image_processor
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
        device: torch.device = self._embedding.weight.device
        return device

    @property
    def _embedding(self) -> Any:
        return self.mllm.get_input_embeddings()

    # -- text to rows -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """Return the image tokens of pictures: (N_v, D) each."""
        inputs = self.image_processor(
            images=list(pictures),
            return_tensors="pt",
        )
        pixels = inputs["pixel_values"].to(self.device, self.mllm.dtype)
        output = self.mllm.get_image_features(pixels, return_dict=True)
        return list(output.pooler_output)

    def token_ids(
        self, instruction: str, expressive: str | None, n_image: int
    ) -> tuple[list[int], int]:
        """Return (ids, length of the prompt) with `n_image` placeholders for the picture.

        Raises DataError for an instruction that is too long or contains the placeholder itself.
        """
        for text in (instruction, expressive or ""):
            if self._placeholder in text or "<image>" in text:
                raise DataError(
                    f"{text!r}: {self._placeholder} stands for the picture",
                    "leave it out",
                )
        filled = self.prompt.replace("{instruction}", instruction)
        before, _, after = filled.partition("<image>")
        prompt = before + self._placeholder + after
        prompt_ids = self._expand_picture(prompt, n_image)
        ids = prompt_ids
        if expressive:
            ids = self._expand_picture(f"{prompt} {expressive}", n_image)
        n_prompt = len(prompt_ids)
        if n_prompt >= self.room:
            raise DataError(
                f"{instruction[:80]!r} takes {n_prompt} tokens with its picture; the model reads {self.room - 1}",
                "say it shorter",
            )
        return ids[: self.room], min(n_prompt, len(ids))

    def _expand_picture(self, text: str, n_image: int) -> list[int]:
        """Return the ids of a text with `n_image` placeholders in the place of its one."""
        (ids,) = self.tokenizer([text])["input_ids"]
        place = ids.index(self._image_id)
        expanded: list[int] = ids[:place]
        expanded += [self._image_id] * n_image
        expanded += ids[place + 1 :]
        return expanded

    @property
    def room(self) -> int:
        """The most tokens that a prompt and its expressive instruction may take; a longer one is cut."""
        return self.max_length - N_TOKENS - 1

    def rows(
        self,
        features: Sequence[Tensor],
        instructions: Sequence[str],
        expressive: Sequence[str | None],
    ) -> list[GuideInput]:
        """Return the inputs for the features of some pictures with their texts; without one, the prompt alone."""
        rows = []
        texts = zip(features, instructions, expressive, strict=True)
        for tokens, instruction, text in texts:
            listed, n_prompt = self.token_ids(
                instruction,
                text,
                len(tokens),
            )
            ids = torch.tensor(listed, device=self.device)
            embeddings = self._embedding(ids)
            is_picture = (ids == self._image_id)[:, None]
            with_picture = embeddings.masked_scatter(
                is_picture,
                tokens.to(embeddings.dtype),
            )
            rows.append(GuideInput(with_picture, ids, n_prompt))
        return rows

    # -- what the model says ------------------------------------------------------------------------------------

    @torch.no_grad()
    def write(
        self,
        pictures: Sequence[Image.Image],
        instructions: Sequence[str],
        *,
        longest: int = 64,
        briefly: bool = False,
    ) -> list[ExpressiveInstruction]:
        """Return the model's descriptions of the edited pictures: greedy decoding, up to its end or IMG0.

        `briefly` asks for few words, for a model that was not trained to use few. A description is never empty: if the
        model says nothing, it is the instruction.
        """
        from transformers import GenerationConfig

        asked = [text + BRIEFLY if briefly else text for text in instructions]
        rows = self.rows(
            self.features(pictures),
            asked,
            [None] * len(asked),
        )
        embeddings, mask = padded(rows)
        # A limit for each row, so that the other rows of a batch do not matter.
        limits = [min(longest, self.room - len(row.ids)) for row in rows]
        end_id = self.tokenizer.eos_token_id
        pad_id = self.tokenizer.pad_token_id
        first_visual = self.n_vocabulary
        ends = {end_id, first_visual}
        later_visual = range(first_visual + 1, first_visual + N_TOKENS)
        config = GenerationConfig(
            max_new_tokens=max(limits),
            do_sample=False,
            eos_token_id=sorted(ends),
            pad_token_id=end_id if pad_id is None else pad_id,
            suppress_tokens=[self._image_id, *later_visual],
        )
        with self._with_visual_tokens(), set_aside(self.mllm):
            output = self.mllm.generate(
                inputs_embeds=embeddings,
                attention_mask=mask,
                generation_config=config,
            )
        derived = []
        for ids, limit, text in zip(output.tolist(), limits, instructions, strict=True):
            derived.append(self._read(ids[:limit], text, ends))
        return derived

    @contextmanager
    def _with_visual_tokens(self) -> Iterator[None]:
        """Inside the block, the language model can generate the visual tokens."""

        def widen(_module: Any, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
            visual = self._visual_logits(inputs[0])
            return torch.cat([logits, visual], -1)

        def narrow(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # A row that ended with IMG0 is fed back while others go on.
            (ids,) = inputs
            return (ids.clamp(max=self.n_vocabulary - 1),)

        handles = [
            self.mllm.get_output_embeddings().register_forward_hook(widen),
            self._embedding.register_forward_pre_hook(narrow),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _read(
        self, ids: list[int], instruction: str, ends: set[int]
    ) -> ExpressiveInstruction:
        """Return generated ids as an expressive instruction; `instruction` is the fallback."""
        stops = [i for i, token in enumerate(ids) if token in ends]
        used = ids[: stops[0]] if stops else ids
        text = clean(self.tokenizer.decode(used, skip_special_tokens=True))
        if not text:
            warning = "the model said nothing: the instruction stands for itself"
            return ExpressiveInstruction(
                instruction,
                "fallback",
                (warning,),
            )
        if stops:
            return ExpressiveInstruction(text, "model")
        warning = f"the expressive instruction was cut after {len(ids)} tokens"
        return ExpressiveInstruction(text, "model", (warning,))

    # -- states and logits --------------------------------------------------------------------------------------

    def states(
        self, rows: Sequence[GuideInput], *, frozen_prefix: bool = False
    ) -> HiddenStates:
        """Return the last hidden states of rows with the visual tokens behind them.

        With `frozen_prefix`, everything before the visual tokens runs without gradients. The result is equal if no
        parameter that the prefix depends on is trained, and it is far cheaper.
        """
        batch = len(rows)
        embeddings, mask = padded(rows)
        visual = self.tokens.embed.to(embeddings.dtype).expand(batch, -1, -1)
        visual_mask = mask.new_ones(batch, N_TOKENS)
        whole_mask = torch.cat([mask, visual_mask], dim=1)
        positions = (whole_mask.cumsum(1) - 1).clamp(min=0)
        start = embeddings.shape[1]
        decoder = self.mllm.get_decoder()
        if not frozen_prefix:
            output = decoder(
                inputs_embeds=torch.cat([embeddings, visual], 1),
                attention_mask=whole_mask,
                position_ids=positions,
                use_cache=False,
            )
            return HiddenStates(output.last_hidden_state, whole_mask, start)
        cache = {cache_argument(decoder): DynamicCache(config=decoder.config)}
        with torch.no_grad():
            prefix = decoder(
                inputs_embeds=embeddings,
                attention_mask=mask,
                position_ids=positions[:, :start],
                use_cache=True,
                **cache,
            )
        tail = decoder(
            inputs_embeds=visual,
            attention_mask=whole_mask,
            position_ids=positions[:, start:],
            use_cache=True,
            **cache,
        )
        hidden = torch.cat([prefix.last_hidden_state, tail.last_hidden_state], 1)
        return HiddenStates(hidden, whole_mask, start)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V + 8) of hidden states (..., D), the visual tokens behind the vocabulary."""
        of_vocabulary = self.mllm.get_output_embeddings()(hidden)
        of_visual_tokens = self._visual_logits(hidden)
        return torch.cat([of_vocabulary, of_visual_tokens], -1)

    def _visual_logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.tokens.unembed.to(hidden.dtype).T

    def labels(
        self, rows: Sequence[GuideInput], *, visual_only: bool = False
    ) -> Tensor:
        """Return the labels of the columns of `states`, (B, T + 8): -100 for the prompt and for padding.

        The visual tokens come behind the expressive instruction, and the end behind them. With `visual_only`, only
        these have labels.
        """
        longest = max(len(row.ids) for row in rows)
        shape = (len(rows), longest + N_TOKENS)
        labels = torch.full(shape, IGNORE, device=self.device)
        # A column predicts the next token: the first visual one is the label of the last column of the text.
        first = longest - 1
        end = first + N_TOKENS
        labels[:, first:end] = torch.arange(
            self.n_vocabulary,
            self.n_vocabulary + N_TOKENS,
            device=self.device,
        )
        labels[:, -1] = self.tokenizer.eos_token_id
        if visual_only:
            return labels
        for i, row in enumerate(rows):
            expressive = row.ids[row.n_prompt :]
            start = first - len(expressive)
            labels[i, start:first] = expressive
        return labels


def cache_argument(decoder: nn.Module) -> str:
    """Return the name of a decoder's argument for its cache: `cache` since transformers 5.24."""
    known = inspect.signature(decoder.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def padded(rows: Sequence[GuideInput]) -> tuple[Tensor, Tensor]:
    """Return rows as one batch, padded on the left: embeddings (B, T, D) and mask (B, T)."""
    lengths = [len(row.ids) for row in rows]
    longest = max(lengths)
    first = rows[0].embeddings
    width = first.shape[1]
    mask = torch.zeros(
        len(rows),
        longest,
        dtype=torch.long,
        device=first.device,
    )
    padded_rows = []
    for i, row in enumerate(rows):
        missing = longest - lengths[i]
        mask[i, missing:] = 1
        zeros = first.new_zeros(missing, width)
        padded_rows.append(torch.cat([zeros, row.embeddings]))
    return torch.stack(padded_rows), mask


def clean(text: str) -> str:
    """Return a text in one line, without the marks of a conversation."""
    for mark in ("ASSISTANT:", "</s>"):
        text = text.replace(mark, " ")
    return " ".join(text.split())
