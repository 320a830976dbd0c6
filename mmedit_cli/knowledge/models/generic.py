"""Any vision-language model of transformers that is a vision tower, a connector and a decoder: asked, not known."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mmedit_cli.errors import DataError, ModelError
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.batch import Batch, Encoded, Prefix, joined
from mmedit_cli.knowledge.models.shared.generation import WithoutQuestion
from mmedit_cli.knowledge.models.shared.image_token import image_token_id
from mmedit_cli.knowledge.models.shared.prefix import (
    arguments_of,
    record_layers,
    run_to,
    substituted,
)
from mmedit_cli.knowledge.models.shared.processors import (
    Overheard,
    Remembered,
    standing_in,
)
from mmedit_cli.model_folder import reason
from mmedit_cli.pictures import Picture, load_picture, picture_size
from mmedit_cli.types import Query

_MARK = "\ufdd1"  # stands for a question: a code point that is no character
_PROBE = (64, 64)  # the size of a picture that stands for others, in pixels
# what a processor says of the text; all else it returns is of the picture
_OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class _Size:
    """What the processor made of a blank picture of some size, and the ids that stand for it in a text."""

    images: Remembered
    n_placeholders: int
    n_tokens: int


class Generic(VisionLanguageModel):
    """A model of AutoModelForImageTextToText; a sequence is what its own processor makes of picture and text.

    The processor is run on the text, with a blank picture of the same size; the model is run up to its decoder on the
    picture. What enters the decoder there, from the first image token to the last, is the picture: tokens between
    them, which part its rows or tiles, belong to it. `image_processor` is the whole processor.

    `fast` is False for a model whose layers cannot be run one by one: what follows a layer is then the whole forward
    pass with its state put in there.
    """

    family = "generic"
    checked = True
    whole_processor = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fast = True
        token = getattr(self.image_processor, "image_token", None)
        if not token:
            raise ModelError(
                f"{self.name}: {type(self.image_processor).__name__} has no token that stands for a picture",
                "supported are processors with an image_token",
            )
        self.image_token = str(token)
        self._image_id = image_token_id(self)
        # what parts and frames the pictures of Ovis2 is embedded by the table of its tower
        around = getattr(self.model.config, "visual_indicator_token_ids", None) or ()
        self._picture_ids = {self._image_id, *around}
        self._of_size = lru_cache(maxsize=1 << 10)(self._measure)

    @classmethod
    def build_tiny(cls, name: str) -> tuple[nn.Module, Any, Any]:
        """Return (model, tokenizer, processor) with seeded random weights, for a name such as tiny-gemma3."""
        from mmedit_cli.knowledge.models.shared import tiny_generic

        return tiny_generic.build(name)

    @property
    def generator(self) -> Any:
        """The model itself."""
        return self.model

    # -- queries to tensors -------------------------------------------------------------------------------------

    def n_image_tokens(self, picture: Picture) -> int:
        """The positions from the first image token to the last, for a picture of this size."""
        return self._sized(picture).n_tokens

    def _sized(self, picture: Picture) -> _Size:
        width, height = picture_size(picture)
        try:
            return self._of_size(width, height)
        except (ValueError, ZeroDivisionError, IndexError) as error:
            raise DataError(
                f"{picture.path}: {width} x {height} pixels cannot be used: {reason(error)}"
            ) from error

    def _measure(self, width: int, height: int) -> _Size:
        """Run the processor on a blank picture of some size."""
        blank = Image.new("RGB", (width, height))
        images = Remembered(self.image_processor.image_processor)
        text, options = self._written(self.image_token + _MARK, images, blank)
        places = self._places(self.tokenizer(text, **options)["input_ids"])
        if not places:
            raise ModelError(
                f"{self.name}: its processor puts no image token (id {self._image_id}) into a text with a picture"
            )
        length = places[-1] - places[0] + 1
        return _Size(images, len(places), length)

    def _written(
        self, text: str, images: Remembered, picture: Image.Image | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Return the text that the processor gives to the tokenizer for a text with a picture, and how."""
        picture = picture or Image.new("RGB", _PROBE)
        listener = Overheard(self.tokenizer)
        with standing_in(self.image_processor, images, listener):
            self._process(images=[[picture]], text=[text])
        return listener.text, listener.of_ids

    def _process(self, **given: Any) -> Any:
        """Return what the processor makes of pictures and texts."""
        with warnings.catch_warnings():
            # NumPy 2 warns of how PaliGemma's makes labels, which are not used
            warnings.simplefilter("ignore", DeprecationWarning)
            return self.image_processor(**given, return_tensors="pt")

    def _places(self, ids: Sequence[int]) -> list[int]:
        return [place for place, token in enumerate(ids) if token in self._picture_ids]

    def _sequence(
        self, prompt: str, target: str | None, picture: Picture | None
    ) -> Encoded:
        size = None if picture is None else self._sized(picture)
        text, options = self._final(prompt, size)
        ids = self.token_ids(text, **options)
        n_answer = 0
        if target is not None:
            answer = joined(Query(text, target))
            whole = self.token_ids(text + answer, **options)
            n_answer = len(whole) - len(ids)
            ids = whole
        places = self._places(ids)
        if len(places) != (size.n_placeholders if size else 0):
            raise DataError(
                f"{prompt!r}: the text has {self._soft_token} in it, which stands for pictures in this model",
                "write it in another way",
            )
        if size is None:
            return Encoded(ids, 0, 0, n_answer)
        return Encoded(ids, places[0], size.n_tokens, n_answer)

    def _final(self, text: str, size: _Size | None) -> tuple[str, dict[str, Any]]:
        """Return a text in the form in which the model's processor hands it on, and how it is tokenized."""
        if size is not None:
            if self.image_token not in text:
                text = f"{self.image_token}{self._between}{text}"
            return self._written(text, size.images)
        listener = Overheard(self.tokenizer)
        probe = self._of_size(*_PROBE)
        with standing_in(self.image_processor, probe.images, listener):
            try:
                self._process(text=[text])
            except ValueError:  # PaliGemma reads no text without a picture
                placed = self.image_token + text
                found, options = self._written(placed, probe.images)
                return found.replace(self._soft_token, ""), options
        return listener.text, listener.of_ids

    @cached_property
    def _soft_token(self) -> str:
        """The token at the image positions, as text: not always the one that stands for the picture before."""
        return str(self.tokenizer.convert_ids_to_tokens(self._image_id))

    @cached_property
    def _between(self) -> str:
        """What parts picture and question outside a chat: as in its chat format, or a newline."""
        if self.tokenizer.chat_template:
            said = self.chat(_MARK, with_image=True)
            between, mark, _ = said.partition(self.image_token)[2].partition(_MARK)
            if mark:
                return between
        probe = self._of_size(*_PROBE)
        text, _ = self._written(self.image_token + _MARK, probe.images)
        follows = text.rpartition(self._soft_token)[2]
        return "\n" if follows.startswith(_MARK) else ""

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        size = self._of_size(*_PROBE)
        alone = self._ids_of(None)
        ids = self._ids_of(size)
        start, *_ = self._places(ids)
        end = start + size.n_tokens
        before = ids[:start]
        behind = ids[end:]
        # what is there without a picture too is no part of it
        n_front = _common(before, alone)
        rest = alone[n_front:]
        n_end = _common(behind[::-1], rest[::-1])
        n_closing = len(behind) - n_end
        return before[n_front:], behind[:n_closing]

    def _ids_of(self, size: _Size | None) -> list[int]:
        """Return the ids of a plain question, with a picture of some size or without one."""
        text, options = self._final(_PLAIN, size)
        return self.token_ids(text, **options)

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """What the processor puts around the picture."""
        return self._frame

    def _prompt_ids(self, text: str, n_image: int) -> tuple[list[int], int]:
        """Return the ids of a text without a picture; one with a picture is read by `_sequence`."""
        final, options = self._final(text, None)
        return self.token_ids(final, **options), 0

    def processed(self, query: Query) -> dict[str, Any]:
        """Return what the model's own processor makes of a question, and its own `generate` takes."""
        if query.image is None:
            batch = self.batch([query], with_answer=False)
            inputs = {
                "input_ids": batch.input_ids,
                "attention_mask": batch.attention_mask,
            }
            return {**inputs, **self.token_types(batch)}
        text = f"{self.image_token}{self._between}{query.prompt}"
        if query.chat:
            text = self.chat(query.prompt, with_image=True)
        picture = load_picture(Picture(query.image, query.background))
        return self._inputs([picture], text)

    # -- pictures -----------------------------------------------------------------------------------------------

    def own_ids(self, batch: Batch) -> Tensor:
        """The ids as they are: the processor made them."""
        return batch.input_ids

    def pixels(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Return what the processor makes of pictures, beside the text."""
        inputs = self._inputs(images)
        return {name: value for name, value in inputs.items() if name not in _OF_TEXT}

    def _inputs(
        self, images: Sequence[Image.Image], text: str | None = None
    ) -> dict[str, Any]:
        """Return what the processor makes of pictures, each in a text of its own."""
        text = text or self.image_token + _PLAIN
        inputs = self._process(
            images=[[image] for image in images],
            text=[text] * len(images),
            padding=True,
        )
        # some return plain lists all the same
        ids = {
            name: torch.as_tensor(inputs[name]) for name in _OF_TEXT if name in inputs
        }
        inputs.update(ids)
        inputs = inputs.to(self.device, self.dtype)
        return {name: inputs[name] for name in inputs if name != "labels"}

    def encode_images(self, images: Sequence[Any]) -> list[Tensor]:
        """Return the image tokens of RGB pictures in memory; those of one size are encoded together."""
        by_size: dict[tuple[int, int], list[int]] = {}
        for row, image in enumerate(images):
            by_size.setdefault(image.size, []).append(row)
        found: dict[int, Tensor] = {}
        for rows in by_size.values():
            alike = [images[row] for row in rows]
            inputs = self._inputs(alike)
            encoded = self._encode_pixels(inputs)
            for row, tokens in zip(rows, encoded, strict=True):
                found[row] = tokens.to(self.device, self.dtype)
        return [found[row] for row in range(len(images))]

    def _encode_pixels(self, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """Run the model up to its decoder, and take what enters it from the first image token to the last."""
        entering = arguments_of(
            lambda: self.model(**inputs, use_cache=False), self._stack
        )
        embeds: Tensor = entering["inputs_embeds"]
        found = []
        for ids, row in zip(inputs["input_ids"].tolist(), embeds, strict=True):
            places = self._places(ids)
            found.append(row[places[0] : places[-1] + 1])
        return found

    def word_embeddings(self, ids: Tensor) -> Tensor:
        """Return the input embeddings of token ids; an image token may have none of its own."""
        rows = len(self._embedding.weight)
        known = ids.masked_fill(ids >= rows, self.pad_id)
        return super().word_embeddings(known)

    # -- what goes into the decoder beside the embeddings -------------------------------------------------------

    @cached_property
    def _types(self) -> tuple[str, dict[int, int]] | None:
        """The types of tokens that the processor returns: under which name, and which ids are not of type 0."""
        blank = Image.new("RGB", _PROBE)
        inputs = self._inputs([blank])
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in inputs:
                pairs = zip(
                    inputs["input_ids"].flatten().tolist(),
                    inputs[name].flatten().tolist(),
                    strict=True,
                )
                return name, {token: kind for token, kind in pairs if kind}
        return None

    @cached_property
    def _counts_positions(self) -> Any:
        """What counts the positions of text and pictures on several axes; None for a model that has one axis."""
        return getattr(self.model.base_model, "get_rope_index", None)

    @property
    def masks_by_type(self) -> bool:
        """Whether the processor gives types that the model makes masks of."""
        return self._types is not None and self._counts_positions is None

    def token_types(self, batch: Batch) -> dict[str, Tensor]:
        """Return the types of tokens, (B, T), under the name that the model has for them; nothing without any.

        Where no token of a question has a type of its own, the answer is of type 1, as PaliGemma has it.
        """
        if self._types is None:
            return {}
        name, by_id = self._types
        types = torch.zeros_like(batch.input_ids)
        for token, kind in by_id.items():
            types[batch.input_ids == token] = kind
        if not by_id:
            types = batch.answer_mask.long()
        return {name: types}

    def position_ids(self, batch: Batch) -> Tensor | None:
        """Positions as the model counts them itself, (axes, B, T); None for 0, 1, 2, ..."""
        count = self._counts_positions
        if count is None:
            return None
        known: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "mm_token_type_ids": (batch.input_ids == self._image_id).int(),
        }
        found = [
            self._sized(batch.pictures[index]).images.found
            for index in batch.picture_of
            if index is not None
        ]
        for name in inspect.signature(count).parameters:
            if found and name in found[0] and name not in known:
                rows = [torch.as_tensor(each[name]) for each in found]
                known[name] = torch.cat(rows).to(self.device)
        accepted = inspect.signature(count).parameters
        given = {name: value for name, value in known.items() if name in accepted}
        positions: Tensor
        positions, _ = count(**given)
        return positions

    def _beside(self, batch: Batch) -> dict[str, Tensor]:
        beside = super()._beside(batch)
        if self.masks_by_type:
            beside |= self.token_types(batch)
        return beside

    def _run_stack(self, embeds: Tensor, batch: Batch) -> Tensor:
        beside = self._beside(batch)
        # masks that depend on the types are made by the model around the decoder
        outer = self.model.base_model if self.masks_by_type else self._stack
        output = outer(
            inputs_embeds=embeds,
            attention_mask=batch.attention_mask,
            use_cache=False,
            **beside,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _generated(self, embeds: Tensor, batch: Batch, **options: Any) -> Tensor:
        """As for all families, from ids: not every class takes embeddings there, so they are put in at the decoder."""
        _, length = batch.input_ids.shape
        streamer = options.pop("streamer")
        with substituted(self._stack, embeds, "inputs_embeds"):
            tokens: Tensor = self.model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                **self._beside(batch),
                **options,
                streamer=streamer and WithoutQuestion(streamer),
            )
        return tokens[:, length:]

    # -- stopping in the middle ---------------------------------------------------------------------------------

    def _run_to(
        self, layer: int, embeds: Tensor, batch: Batch
    ) -> tuple[Tensor, tuple[dict[str, Any], ...]]:
        """As for all families, but each layer may receive something else: windows, rotary embeddings."""
        at_the_end = layer == self.n_layers
        if at_the_end or not self.fast:
            return super()._run_to(layer, embeds, batch)

        def run() -> Tensor:
            return self._run_stack(embeds, batch)

        return record_layers(run, self.layers, layer)

    def prefix_of(self, hidden: Tensor, batch: Batch, layer: int) -> Prefix:
        """As for all families; nothing is rebuilt where layers are not run one by one."""
        if self.fast:
            return super().prefix_of(hidden, batch, layer)
        self._check_layer(layer)
        return Prefix(layer, batch, hidden, ())

    def advance(self, prefix: Prefix, layer: int) -> Prefix:
        """As for all families; else the whole pass again, with the state put in where it belongs."""
        if self.fast or layer == prefix.layer:
            return super().advance(prefix, layer)
        self._check_layer(layer)
        embeds, deepstack = self._entering(prefix.batch)
        start = self.layers[prefix.layer]
        end = self.layers[layer] if layer < self.n_layers else self._tail[0]
        with (
            self._pass(prefix.batch, deepstack),
            substituted(start, prefix.hidden),
        ):
            hidden, _ = run_to(lambda: self._run_stack(embeds, prefix.batch), end)
        return replace(prefix, layer=layer, hidden=hidden)


_PLAIN = "What is this?"


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common at the front."""
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length


BACKBONE = Generic
