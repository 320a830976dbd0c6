"""The adapter every vision-language model sits behind: batches, logits, generation, and stopping in the middle."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmedit_cli.backbones._anchors import Anchors
from mmedit_cli.errors import DataError, ModelError, TooLong
from mmedit_cli.pictures import Picture, load_picture
from mmedit_cli.prefix import Prefix, RowCache, run_to
from mmedit_cli.types import Query

IGNORE = -100
Features = RowCache[Picture]


@dataclass(frozen=True)
class Batch:
    """Queries as tensors, right-padded (left-padded for generation).

    input_ids, attention_mask: (B, T); labels: (B, T), the answer tokens at their own positions and -100 elsewhere;
    image_mask, prompt_mask, answer_mask: (B, T) bool; the prompt is everything between the image and the answer.
    `pictures` are the distinct images in order of first use, `picture_of` the index of each row's own, or None.
    """

    queries: tuple[Query, ...]
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    image_mask: Tensor
    prompt_mask: Tensor
    answer_mask: Tensor
    pictures: tuple[Picture, ...]
    picture_of: tuple[int | None, ...]

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each row."""
        return self.attention_mask.sum(1).tolist()

    @property
    def predicting(self) -> Tensor:
        """(B, T) bool: the positions whose logits predict the answer tokens, one before each of them."""
        return predicting(self.answer_mask)

    @property
    def answers(self) -> Tensor:
        """(n,): the answer tokens of all rows, in the order of `logits[predicting]`."""
        return self.labels[self.answer_mask]


def predicting(answer_mask: Tensor) -> Tensor:
    """Shift an answer mask (B, T) one position to the left: logits at t predict the token at t + 1."""
    return torch.cat((answer_mask[:, 1:], torch.zeros_like(answer_mask[:, :1])), dim=1)


@dataclass(frozen=True)
class Encoded:
    """One query as token ids: `n_image` placeholders from `image_start`, and `n_answer` answer tokens at the end."""

    ids: list[int]
    image_start: int
    n_image: int
    n_answer: int


class VisionLanguageModel(ABC):
    """A frozen vision-language model; subclasses (one a family) say how a prompt and an image become tokens."""

    family: ClassVar[str]
    image_token: ClassVar[str] = "<image>"

    def __init__(self, name: str, model: nn.Module, tokenizer: Any, image_processor: Any, fingerprint: str) -> None:
        self.name, self.model, self.tokenizer, self.image_processor = name, model, tokenizer, image_processor
        self.fingerprint = fingerprint
        self.model.eval().requires_grad_(False)
        self.anchors = Anchors(model)
        self.layers: nn.ModuleList = self.anchors.layers
        self.n_layers = len(self.layers)
        self.width: int = model.config.get_text_config().hidden_size
        self.max_length: int = model.config.get_text_config().max_position_embeddings
        self._stack = model.get_submodule(self.anchors.stack)
        self._tail = [model.get_submodule(n) for n in self.anchors.tail]
        pad = tokenizer.pad_token_id
        self.pad_id: int = tokenizer.eos_token_id if pad is None else pad
        self._encode = lru_cache(maxsize=1 << 16)(self._tokenize)  # a query is asked at every milestone

    # -- what a family has to say -------------------------------------------------------------------------------

    @property
    @abstractmethod
    def generator(self) -> Any:
        """The module whose `generate(inputs_embeds=...)` continues a sequence."""

    @abstractmethod
    def _prompt_ids(self, text: str, *, with_image: bool) -> tuple[list[int], int, int]:
        """Return (token ids, image start, number of image tokens) of a text; the placeholders are already expanded."""

    @abstractmethod
    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        """Return the image tokens as the language model sees them: (n, C, H, W) -> (n, N_v, D)."""

    # -- queries to tensors -------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the embeddings are, and so the inputs."""
        return self._embedding.weight.device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the language model."""
        return self._embedding.weight.dtype  # type: ignore[no-any-return]

    @property
    def _embedding(self) -> Any:
        return self.model.get_input_embeddings()

    def encode(self, query: Query, *, with_answer: bool = True) -> Encoded:
        """Return one query as token ids; raise DataError for an empty prompt or answer, or a text that is too long.

        The answer tokens are those that prompt + answer has more than the prompt alone (LiveEdit, evaluation code).
        """
        return self._encode(query, with_answer)

    def _tokenize(self, query: Query, with_answer: bool) -> Encoded:
        prompt, with_image = query.prompt, query.image is not None
        if not prompt.strip():
            raise DataError("the prompt is empty")
        if with_answer and not query.target.strip():
            raise DataError(f"the target of {prompt!r} is empty")
        if self.image_token in prompt + query.target:
            raise DataError(
                f"{self.image_token!r} inside the text of {prompt!r}: one image a query, several are not supported",
                "leave the placeholder out and name the picture in `image`",
            )
        if query.chat:
            prompt = self.chat(prompt, with_image=with_image)
        text = prompt + joined(replace(query, prompt=prompt)) if with_answer else prompt
        ids, start, n_image = self._prompt_ids(text, with_image=with_image)
        n_answer = len(ids) - len(self._prompt_ids(prompt, with_image=with_image)[0])
        if with_answer and n_answer <= 0:
            raise DataError(f"the target {query.target!r} of {prompt!r} has no tokens in this model's vocabulary")
        if len(ids) > self.max_length:
            raise TooLong(
                f"{prompt!r} takes {len(ids)} tokens with its image; {self.name} reads {self.max_length}",
                "--skip-long goes on without such queries",
            )
        return Encoded(ids, start, n_image, n_answer)

    def chat(self, prompt: str, *, with_image: bool) -> str:
        """Return a question in the chat format of the model, up to where the answer begins.

        `image_token` stands where the picture goes, so `_prompt_ids` must take a text that has it already. Raises
        ModelError if the tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise ModelError(f"{self.name} has no chat template", "ask it with another --template, such as plain")
        content = [{"type": "image"}] if with_image else []
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return str(text).removeprefix(self.tokenizer.bos_token or "")  # the tokenizer puts it in front itself

    def batch(self, queries: Sequence[Query], *, with_answer: bool = True, left_pad: bool = False) -> Batch:
        """Return the queries as one batch; raise DataError as `encode` does, or ValueError if there are none."""
        if not queries:
            raise ValueError("a batch needs at least one query")
        rows = [self.encode(query, with_answer=with_answer) for query in queries]
        shape = (len(rows), max(len(row.ids) for row in rows))
        ids = torch.full(shape, self.pad_id)
        masks = {name: torch.zeros(shape, dtype=torch.bool) for name in ("token", "image", "prompt", "answer")}
        for i, row in enumerate(rows):
            offset = shape[1] - len(row.ids) if left_pad else 0
            end, image_end = offset + len(row.ids), offset + row.image_start + row.n_image
            ids[i, offset:end] = torch.tensor(row.ids)
            masks["token"][i, offset:end] = True
            masks["image"][i, offset + row.image_start : image_end] = True
            masks["prompt"][i, image_end : end - row.n_answer] = True
            masks["answer"][i, end - row.n_answer : end] = True
        seen = [Picture(q.image, q.background) if q.image is not None else None for q in queries]
        pictures = tuple(dict.fromkeys(picture for picture in seen if picture is not None))
        on = {name: mask.to(self.device) for name, mask in masks.items()}
        ids = ids.to(self.device)
        return Batch(
            queries=tuple(queries),
            input_ids=ids,
            attention_mask=on["token"].long(),
            labels=torch.where(on["answer"], ids, IGNORE),
            image_mask=on["image"],
            prompt_mask=on["prompt"],
            answer_mask=on["answer"],
            pictures=pictures,
            picture_of=tuple(None if picture is None else pictures.index(picture) for picture in seen),
        )

    # -- forward passes -----------------------------------------------------------------------------------------

    def image_features(self, pictures: Sequence[Picture]) -> Tensor:
        """Return the image tokens of each picture: (n, N_v, D)."""
        loaded = [load_picture(picture) for picture in pictures]
        pixels = self.image_processor(images=loaded, return_tensors="pt")["pixel_values"]
        return self._encode_pixels(pixels.to(self.device, self.dtype)).to(self.device, self.dtype)

    def embed(self, batch: Batch, features: Features | None = None) -> Tensor:
        """Return what enters the language model: (B, T, D), text embeddings with the image tokens put in their places.

        `features` serves image tokens that were computed before; without it each distinct picture is encoded here.
        """
        embeds = self._embedding(batch.input_ids)
        rows = [index for index in batch.picture_of if index is not None]
        if not rows:
            return embeds
        encoded = (
            self.image_features(batch.pictures)
            if features is None
            else torch.stack(features.get(batch.pictures)).to(self.device)
        )
        return embeds.masked_scatter(batch.image_mask.unsqueeze(-1), encoded[rows].to(embeds.dtype))

    def logits(self, batch: Batch, features: Features | None = None) -> Tensor:
        """Return the logits of the whole model: (B, T, V)."""
        return self.forward_embeds(self.embed(batch, features), batch.attention_mask)

    def forward_embeds(self, embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Run the language model on embeddings (B, T, D) and return its logits (B, T, V)."""
        return self._tail[-1](self._run_stack(embeds, attention_mask))

    def prefix(self, batch: Batch, layer: int, features: Features | None = None) -> Prefix:
        """Run up to decoder layer `layer` (0 .. n_layers) and stop there; what follows is `resume`."""
        self._check_layer(layer)
        target = self.layers[layer] if layer < self.n_layers else self._tail[0]
        embeds = self.embed(batch, features)
        hidden, context = run_to(lambda: self.forward_embeds(embeds, batch.attention_mask), target)
        if layer == self.n_layers:
            context = {}
        return Prefix(layer, hidden, batch.attention_mask, context)

    def prefix_of(self, hidden: Tensor, attention_mask: Tensor, layer: int) -> Prefix:
        """Return the prefix for a hidden state (B, T, D) that was computed before; masks and positions are rebuilt."""
        self._check_layer(layer)
        if layer == self.n_layers:
            return Prefix(layer, hidden, attention_mask, {})
        embeds = torch.zeros(*hidden.shape[:2], self._embedding.weight.shape[1], dtype=self.dtype, device=self.device)
        _, context = run_to(lambda: self._run_stack(embeds, attention_mask), self.layers[0])
        return Prefix(layer, hidden, attention_mask, context)

    def resume(self, prefix: Prefix, at: Tensor | None = None) -> Tensor:
        """Run the layers from `prefix.layer` on and return the logits: (B, T, V), or (n, V) at the positions `at`.

        `resume(prefix(batch, k))` equals `logits(batch)` bit for bit. `at`: (B, T) bool.
        """
        hidden = prefix.hidden
        for layer in self.layers[prefix.layer :]:
            output = layer(hidden, **prefix.context)
            hidden = output[0] if isinstance(output, tuple) else output
        if at is not None:
            hidden = hidden[at.to(hidden.device)]
        for module in self._tail:
            hidden = module(hidden)
        return hidden

    def _run_stack(self, embeds: Tensor, attention_mask: Tensor) -> Tensor:
        return self._stack(inputs_embeds=embeds, attention_mask=attention_mask, use_cache=False).last_hidden_state

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer <= self.n_layers:
            raise ModelError(f"layer {layer}: {self.name} has the layers 0 to {self.n_layers - 1}")

    # -- generation ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self, queries: Sequence[Query], *, max_new_tokens: int = 32, features: Features | None = None
    ) -> list[str]:
        """Return the greedy answer to each query, cut at the end token or the first newline, and stripped."""
        from transformers import GenerationConfig, StoppingCriteriaList

        batch = self.batch(queries, with_answer=False, left_pad=True)
        room = self.max_length - batch.input_ids.shape[1]
        if room < 1:
            raise DataError(f"{self.name} reads {self.max_length} tokens: no room for an answer to the longest prompt")
        tokens = self.generator.generate(
            inputs_embeds=self.embed(batch, features),
            attention_mask=batch.attention_mask,
            generation_config=GenerationConfig(
                max_new_tokens=min(max_new_tokens, room),
                do_sample=False,
                pad_token_id=self.pad_id,
                eos_token_id=self._end_ids,
            ),
            stopping_criteria=StoppingCriteriaList([self._newline_stop()]),
        )
        return [self._decode(row) for row in tokens.tolist()]

    @property
    def _end_ids(self) -> list[int]:
        config = getattr(self.generator, "generation_config", None)
        ids = getattr(config, "eos_token_id", None)
        found = ids if isinstance(ids, list) else [ids, self.tokenizer.eos_token_id]
        return sorted({i for i in found if i is not None})

    def _newline_stop(self) -> Callable[..., Tensor]:
        """Return a stopping rule: a row is finished once it has produced a token with a newline in it."""
        if not hasattr(self, "_newline"):
            size = self.model.get_output_embeddings().weight.shape[0]
            texts = self.tokenizer.batch_decode([[i] for i in range(min(size, len(self.tokenizer)))])
            flags = ["\n" in text for text in texts] + [False] * max(0, size - len(texts))
            self._newline = torch.tensor(flags, device=self.device)
        return lambda ids, _scores, **_: self._newline[ids[:, -1]]

    def _decode(self, tokens: list[int]) -> str:
        ends = [i for i, token in enumerate(tokens) if token in self._end_ids]
        text = self.tokenizer.decode(tokens[: ends[0]] if ends else tokens, skip_special_tokens=True)
        return str(text).strip("\r ").split("\n")[0].strip()


def joined(query: Query) -> str:
    """Return the target as it follows the prompt: with one blank between, unless there is white space already."""
    if query.prompt[-1:].isspace() or query.target[:1].isspace():
        return query.target
    return " " + query.target
