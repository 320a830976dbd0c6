"""The adapter every vision-language model sits behind: batches, logits, generation, and stopping in the middle."""

from __future__ import annotations

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mmedit_cli.errors import DataError, ModelError, NotFinite, TooLong
from mmedit_cli.finite import all_finite, not_finite
from mmedit_cli.knowledge.models.shared.anchors import Anchors
from mmedit_cli.knowledge.models.shared.batch import (
    ActivationCache,
    Batch,
    Encoded,
    Prefix,
    collate,
    joined,
)
from mmedit_cli.knowledge.models.shared.generation import (
    described,
    own_settings,
    sampling_config,
    set_aside,
)
from mmedit_cli.knowledge.models.shared.image_token import image_token_id
from mmedit_cli.knowledge.models.shared.prefix import DeepStack, RowCache, run_to
from mmedit_cli.patch import bring_in
from mmedit_cli.pictures import Picture, load_picture
from mmedit_cli.types import Query

_ONCE_BYTES = (
    1 << 30
)  # of image tokens that are kept while something is made of pictures
# stands for the image token where a user wrote it in a text: a code point that is no character
WRITTEN = "\ufdd0"


class VisionLanguageModel(ABC):
    """A frozen vision-language model; subclasses (one a family) say how a prompt and an image become tokens.

    A language model is one that `sees` nothing. `auto_class` names the class of transformers that loads the model.
    `current_batch` is the batch that is in a forward pass at the moment, for hooks that need its masks; else None.
    `rewrite` is applied to every query before it is encoded: editors that work in the context set it; else None.
    `before_pass` are told of every batch before it enters: editors that ask the model about its pictures themselves.

    A family of a plug-in says here what the built-in ones say in `catalog.py`: `model_types` are the names that
    `config.json` has for its models, `tiny_models` the names of random models that `build_tiny` makes.
    """

    family: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]] = ()
    tiny_models: ClassVar[tuple[str, ...]] = ()
    auto_class: ClassVar[str] = "AutoModelForImageTextToText"
    sees: ClassVar[bool] = True
    # whether one stack of layers reads the question, and another writes the answer
    encoder_decoder: ClassVar[bool] = False
    checked: ClassVar[bool] = (
        False  # whether a model is tried out when it is opened first
    )
    whole_processor: ClassVar[bool] = (
        False  # of the model, in the place of an image processor
    )
    image_token: str = "<image>"
    former: str = ""  # the fingerprint that version 0.1.0 gave to the same files
    n_deepstack: int = 0  # decoder layers behind which image tokens are added once more

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        image_processor: Any,
        fingerprint: str,
    ) -> None:
        self.name = name
        self.model = model  # families call methods that only their class has
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.fingerprint = fingerprint
        self.model.eval().requires_grad_(False)
        # device and dtype are read from the embeddings
        bring_in(model, _name_of(model, self._embedding))
        self.anchors = Anchors(model)
        self.layers: nn.ModuleList = self.anchors.layers
        self.n_layers = len(self.layers)
        config = self.model.config.get_text_config()
        self.width: int = config.hidden_size
        self.max_length = self.longest(config)
        self._stack = model.get_submodule(self.anchors.stack)
        self._tail = [model.get_submodule(path) for path in self.anchors.tail]
        pad = tokenizer.pad_token_id
        self.pad_id: int = tokenizer.eos_token_id if pad is None else pad
        # a query is asked at every milestone
        self._encode = lru_cache(maxsize=1 << 16)(self._tokenize)
        self.current_batch: Batch | None = None
        self.rewrite: Callable[[Query], Query] | None = None
        self.before_pass: list[Callable[[Batch], None]] = []
        self._cache: ActivationCache | None = None
        self._encoded: tuple[Batch, Sequence[Tensor]] | None = None  # of the last batch

    def __repr__(self) -> str:
        number = str(self.dtype).removeprefix("torch.")
        kind = type(self).__name__
        return f"<{kind} {self.name}: {self.n_layers} layers of {self.width}, {number} on {self.device}>"

    @classmethod
    def longest(cls, config: Any) -> int:
        """Return how many tokens a language model reads, by its config."""
        length: int = config.max_position_embeddings
        return length

    # -- what a family has to say -------------------------------------------------------------------------------

    @classmethod
    def build_tiny(cls, name: str) -> tuple[nn.Module, Any, Any]:
        """Return (model, tokenizer, image processor) with seeded random weights, for a name such as tiny-llava."""
        from mmedit_cli.knowledge.models.shared import tiny

        return tiny.build(name)

    @property
    @abstractmethod
    def generator(self) -> Any:
        """The module whose `generate(inputs_embeds=...)` continues a sequence."""

    @abstractmethod
    def n_image_tokens(self, picture: Picture) -> int:
        """Return N_v, the number of positions a picture takes; at most its header is read, and DataError raised."""

    @abstractmethod
    def _prompt_ids(self, text: str, n_image: int) -> tuple[list[int], int]:
        """Return (token ids, image start) of a text with `n_image` placeholders for its picture (0: without one)."""

    @abstractmethod
    def _encode_pixels(self, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """Return the tokens of each picture, as `image_features` does, from what the image processor made of them."""

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """The tokens right before and right behind the image tokens that are there for the picture alone."""
        return [], []

    @property
    def masks_by_type(self) -> bool:
        """Whether it depends on the types of tokens which of them see each other."""
        return False

    def position_ids(self, batch: Batch) -> Tensor | None:
        """Return the positions for rotary embeddings, (axes, B, T); None: the model counts 0, 1, 2, ... itself."""
        return None

    # -- queries to tensors -------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the embeddings are, and so the inputs."""
        return self._embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the language model."""
        return self._embedding.weight.dtype

    @property
    def entry_width(self) -> int:
        """The width of what enters the language model: that of its word embeddings, E, mostly D."""
        return self._embedding.weight.shape[1]

    @property
    def _embedding(self) -> nn.Embedding:
        embedding: nn.Embedding = self.model.get_input_embeddings()
        return embedding

    def encode(self, query: Query, *, with_answer: bool = True) -> Encoded:
        """Return one query as token ids; raise DataError for an empty prompt or answer, or a text that is too long.

        The answer tokens are those that prompt + answer has more than the prompt alone (LiveEdit, evaluation code).
        """
        rewritten = query if self.rewrite is None else self.rewrite(query)
        return self._encode(rewritten, with_answer)

    def _tokenize(self, query: Query, with_answer: bool) -> Encoded:
        prompt = query.prompt
        if not prompt.strip():
            raise DataError("the prompt is empty")
        if with_answer and not query.target.strip():
            raise DataError(f"the target of {prompt!r} is empty")
        prompt = prompt.replace(self.image_token, WRITTEN)
        target = query.target.replace(self.image_token, WRITTEN)
        picture = None
        if query.image is not None:
            picture = Picture(query.image, query.background)
        if query.chat:
            prompt = self.chat(prompt, with_image=picture is not None)
        encoded = self._sequence(prompt, target if with_answer else None, picture)
        if with_answer and encoded.n_answer <= 0:
            raise DataError(
                f"the target {query.target!r} of {prompt!r} has no tokens in this model's vocabulary"
            )
        length = len(encoded.ids)
        if length > self.max_length:
            raise TooLong(
                f"{query.prompt!r} takes {length} tokens with its image; {self.name} reads {self.max_length}",
                "--skip-long goes on without such queries",
            )
        return encoded

    def _sequence(
        self, prompt: str, target: str | None, picture: Picture | None
    ) -> Encoded:
        """Return a prompt as token ids, with its picture and the answer to it, where there is one."""
        n_image = 0 if picture is None else self.n_image_tokens(picture)
        text = prompt
        if target is not None:
            text += joined(Query(prompt, target))
        ids, start = self._prompt_ids(text, n_image)
        n_answer = len(ids) - len(self._prompt_ids(prompt, n_image)[0])
        return Encoded(ids, start, n_image, n_answer)

    def token_ids(self, text: str, **options: Any) -> list[int]:
        """Return a text as token ids; where the image token was written in a question, it is spelled as text."""
        first, *others = text.split(WRITTEN)
        ids: list[int] = self.tokenizer(first, **options)["input_ids"]
        for other in others:
            behind = self.tokenizer(other, add_special_tokens=False)["input_ids"]
            ids = [*ids, *self._spelled, *behind]
        return ids

    @cached_property
    def _spelled(self) -> list[int]:
        """The image token as text, in tokens of its letters."""
        found = self.tokenizer(
            self.image_token, add_special_tokens=False, split_special_tokens=True
        )
        return list(found["input_ids"])

    def chat(self, prompt: str, *, with_image: bool) -> str:
        """Return a question in the chat format of the model, up to where the answer begins.

        `image_token` stands where the picture goes, so `_prompt_ids` must take a text that has it already. Raises
        ModelError if the tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise ModelError(
                f"{self.name} has no chat template", "leave --template chat out"
            )
        content = self._message(prompt, with_image=with_image)
        messages = [{"role": "user", "content": content}]
        text = str(
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        )
        if self._adds_bos:
            text = text.removeprefix(self.tokenizer.bos_token)
        return text

    def _message(self, prompt: str, *, with_image: bool) -> Any:
        """Return the content of a message, in the form that the chat template reads."""
        content = []
        if with_image:
            content.append({"type": "image"})
        text = {"type": "text", "text": prompt}
        content.append(text)
        return content

    @cached_property
    def _adds_bos(self) -> bool:
        """Whether the tokenizer puts the bos token in front itself."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]

    def batch(
        self,
        queries: Sequence[Query],
        *,
        with_answer: bool = True,
        left_pad: bool = False,
    ) -> Batch:
        """Return the queries as one batch; raise DataError as `encode` does, or ValueError if there are none."""
        if not queries:
            raise ValueError("a batch needs at least one query")
        rows = [self.encode(query, with_answer=with_answer) for query in queries]
        return collate(
            queries,
            rows,
            self.pad_id,
            self.device,
            left_pad=left_pad,
        )

    # -- forward passes -----------------------------------------------------------------------------------------

    def image_features(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """Return the image tokens of each picture: (N_v, (1 + n_deepstack) * D), those that are added later behind D.

        Raises DataError for a picture that cannot be read, ModelError for one that is not what it was when measured.
        """
        found = self.encode_images([load_picture(picture) for picture in pictures])
        for picture, tokens in zip(pictures, found, strict=True):
            expected = self.n_image_tokens(picture)
            if len(tokens) != expected:
                raise ModelError(
                    f"{picture.path}: {len(tokens)} image tokens where {expected} were expected",
                    "did the file change, or is the image processor of another model?",
                )
        return found

    def encode_images(self, images: Sequence[Any]) -> list[Tensor]:
        """Return the image tokens of RGB pictures in memory, as `image_features` does of files."""
        found = self._encode_pixels(self.pixels(images))
        return [tokens.to(self.device, self.dtype) for tokens in found]

    def pixels(self, images: Sequence[Any]) -> Mapping[str, Any]:
        """Return what the model takes of RGB pictures in memory, by the names of its arguments."""
        inputs = self.image_processor(
            images=list(images),
            return_tensors="pt",
        )
        found: Mapping[str, Any] = inputs.to(self.device, self.dtype)
        return found

    def own_ids(self, batch: Batch) -> Tensor:
        """Return the ids that the model's own forward pass takes, (B, T): the image token where pictures are."""
        if not self.sees:
            return batch.input_ids
        return batch.input_ids.masked_fill(batch.image_mask, image_token_id(self))

    def token_types(self, batch: Batch) -> dict[str, Tensor]:
        """Return the types of tokens that the model's own forward pass takes beside the ids, by its argument."""
        arguments = inspect.signature(type(self.model).forward).parameters
        if "mm_token_type_ids" not in arguments:
            return {}
        return {"mm_token_type_ids": batch.image_mask.int()}

    def word_embeddings(self, ids: Tensor) -> Tensor:
        """Return the input embeddings of token ids: (...) -> (..., E)."""
        embeddings: Tensor = self._embedding(ids)
        return embeddings

    def embed(self, batch: Batch) -> Tensor:
        """Return what enters the language model: (B, T, D), text embeddings with the image tokens put in their places.

        Each distinct picture is encoded once a batch, or once in all inside `cached_activations`.
        """
        return self._entering(batch)[0]

    def _entering(self, batch: Batch) -> tuple[Tensor, DeepStack | None]:
        """Return what enters the language model, and what is added behind its first layers."""
        embeds = self.word_embeddings(batch.input_ids)
        rows = [index for index in batch.picture_of if index is not None]
        if not rows:
            return embeds, None
        by_picture = self._image_tokens(batch)
        self._encoded = (batch, by_picture)
        by_row = [by_picture[index].to(self.device) for index in rows]
        tokens = torch.cat(by_row).to(embeds.dtype)
        width = embeds.shape[-1]
        # the columns behind the first `width` are added behind later layers
        first, *later = torch.split(tokens, width, dim=-1)
        at_images = batch.image_mask.unsqueeze(-1)
        embeds = embeds.masked_scatter(at_images, first)
        if not later:
            return embeds, None
        deepstack = DeepStack(batch.image_mask, torch.stack(later, 1))
        return embeds, deepstack

    def mean_image_tokens(self, batch: Batch) -> Tensor:
        """Return the mean of each row's image tokens as they enter the language model: (B, E), 0 without a picture."""
        if self._encoded is None or self._encoded[0] is not batch:
            self._encoded = (batch, self._image_tokens(batch))
        _, by_picture = self._encoded
        width = self.entry_width
        means = []
        for tokens in by_picture:
            entering = tokens.to(self.device)[:, :width]
            means.append(entering.mean(0))
        no_picture = torch.zeros(
            width,
            dtype=self.dtype,
            device=self.device,
        )
        rows = []
        for index in batch.picture_of:
            row = no_picture if index is None else means[index]
            rows.append(row)
        return torch.stack(rows)

    def _image_tokens(self, batch: Batch) -> Sequence[Tensor]:
        if self._cache is None:
            return self.image_features(batch.pictures)
        return self._cache.features.get(batch.pictures)

    def by_picture(
        self,
        name: str,
        compute: Callable[[Sequence[Picture]], Sequence[Tensor]],
        pictures: Sequence[Picture],
    ) -> Sequence[Tensor]:
        """Return what `compute` makes of each picture; inside `cached_activations` it is asked once a picture.

        `name` tells one computation from another; what it makes must not depend on edits. While it is made, each
        picture is encoded once.
        """
        if not pictures:
            return []
        if self._cache is None:
            once = self.cached_activations(
                None,
                (),
                group=len(pictures),
                budget=_ONCE_BYTES,
            )
            with once:
                return compute(pictures)
        found = self._cache.found
        if name not in found:
            features = self._cache.features
            rows = RowCache(
                compute,
                group=features.group,
                budget=features.budget,
                spill=True,
            )
            rows.plan(features.planned)
            found[name] = rows
        return found[name].get(pictures)

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits of the whole model: (B, T, V); raise NotFinite for NaN or infinity."""
        logits = self._logits(batch)
        self._check_logits(logits, batch)
        return logits

    def _logits(self, batch: Batch) -> Tensor:
        embeds, deepstack = self._entering(batch)
        with self._pass(batch, deepstack):
            hidden = self._run_stack(embeds, batch)
            logits: Tensor = self._tail[-1](hidden)
        return logits

    def _check_logits(self, logits: Tensor, batch: Batch) -> None:
        if not all_finite(logits):
            raise self._not_finite(batch)

    def _not_finite(self, batch: Batch) -> NotFinite:
        """Return the error that names the first module with NaN: everything is computed again, the pictures too."""

        def again() -> None:
            self._cache = None
            self._encoded = None
            self._logits(batch)

        before = self._cache
        try:
            return not_finite(f"{self.name}: the logits", self.model, again)
        finally:
            self._cache = before
            self._encoded = None

    def prefix(self, batch: Batch, layer: int) -> Prefix:
        """Run up to decoder layer `layer` (0 .. n_layers) and stop there; what follows is `resume`."""
        self._check_layer(layer)
        if self._cache is not None and self._cache.layer == layer:
            rows = self._cache.prefixes.get(batch.queries)
            hidden = pad_sequence(rows, batch_first=True).to(self.device)
            return self.prefix_of(hidden, batch, layer)
        return self._compute_prefix(batch, layer)

    def _compute_prefix(self, batch: Batch, layer: int) -> Prefix:
        embeds, deepstack = self._entering(batch)
        with self._pass(batch, deepstack):
            hidden, contexts = self._run_to(layer, embeds, batch)
        if layer >= self.n_deepstack:
            deepstack = None
        return Prefix(layer, batch, hidden, contexts, deepstack)

    def _run_to(
        self, layer: int, embeds: Tensor, batch: Batch
    ) -> tuple[Tensor, tuple[dict[str, Any], ...]]:
        """Return what enters decoder layer `layer`, and what each layer from there on receives beside it."""
        target = self.layers[layer] if layer < self.n_layers else self._tail[0]
        hidden, context = run_to(lambda: self._run_stack(embeds, batch), target)
        if layer == self.n_layers:
            return hidden, ()
        # all layers of a family that is known by name receive the same
        return hidden, (context,) * self.n_layers

    def prefix_of(self, hidden: Tensor, batch: Batch, layer: int) -> Prefix:
        """Return the prefix for a hidden state (B, T, D) that was computed before; masks and positions are rebuilt."""
        self._check_layer(layer)
        if layer == self.n_layers:
            return Prefix(layer, batch, hidden, ())
        deepstack = None
        if layer < self.n_deepstack:
            _, deepstack = self._entering(batch)
        # masks and positions depend on the shape alone
        shape = (*hidden.shape[:2], self.entry_width)
        embeds = torch.zeros(
            shape,
            dtype=self.dtype,
            device=self.device,
        )
        _, contexts = self._run_to(0, embeds, batch)
        return Prefix(layer, batch, hidden, contexts, deepstack)

    def select(self, prefix: Prefix, rows: Sequence[int]) -> Prefix:
        """Return the prefix of some rows of a right-padded batch, without the padding they do not need."""
        queries = prefix.batch.queries
        chosen = [queries[row] for row in rows]
        batch = self.batch(chosen)
        _, length = batch.input_ids.shape
        hidden = prefix.hidden[list(rows)]
        hidden = hidden[:, :length]
        return self.prefix_of(hidden, batch, prefix.layer)

    def advance(self, prefix: Prefix, layer: int) -> Prefix:
        """Run the layers from `prefix.layer` up to `layer` and stop there again."""
        self._check_layer(layer)
        hidden = prefix.hidden
        with self._pass(prefix.batch, prefix.deepstack):
            for index in range(prefix.layer, layer):
                output = self.layers[index](hidden, **prefix.contexts[index])
                hidden = output[0] if isinstance(output, tuple) else output
        return replace(prefix, layer=layer, hidden=hidden)

    def resume(self, prefix: Prefix, at: Tensor | None = None) -> Tensor:
        """Run the layers from `prefix.layer` on and return the logits: (B, T, V), or (n, V) at the positions `at`.

        `resume(prefix(batch, k))` equals `logits(batch)` bit for bit. `at`: (B, T) bool. Raises NotFinite for NaN or
        infinity.
        """
        hidden = self.advance(prefix, self.n_layers).hidden
        with self._pass(prefix.batch):
            hidden = self._tail[0](hidden)  # whole rows: what hooks on it read
        if at is not None:
            hidden = hidden[at.to(hidden.device)]
        for module in self._tail[1:]:
            hidden = module(hidden)
        logits: Tensor = hidden
        self._check_logits(logits, prefix.batch)
        return logits

    @contextmanager
    def cached_activations(
        self,
        layer: int | None,
        queries: Sequence[Query],
        *,
        group: int,
        budget: int,
        tick: Callable[[int], None] = lambda _n: None,
    ) -> Iterator[ActivationCache]:
        """Inside the block, compute the image tokens of each picture and the prefix at `layer` of each query once.

        Without a layer, the image tokens alone.
        Right only while nothing below `layer` changes. The rows are computed in groups of `group` that are fixed by
        the list of queries, so that an interrupted run that goes on computes the same bits. `budget`: bytes in
        memory, the rest spills to disk. `tick(n)` is told of n queries more that were run to `layer`.
        """

        def compute(members: Sequence[Query]) -> list[Tensor]:
            assert layer is not None, "no layer has a cache"
            batch = self.batch(members)
            prefix = self._compute_prefix(batch, layer)
            rows = []
            for row, length in zip(prefix.hidden, batch.lengths, strict=True):
                rows.append(row[:length])
            return rows

        distinct = self.by_length(queries)
        pictures = [
            Picture(query.image, query.background)
            for query in distinct
            if query.image is not None
        ]
        for_features = budget // 4
        features: RowCache[Picture] = RowCache(
            self.image_features, group=group, budget=for_features, spill=True
        )
        prefixes: RowCache[Query] = RowCache(
            compute, group=group, budget=budget - for_features, spill=True, tick=tick
        )
        features.plan(pictures)
        prefixes.plan(distinct)
        before = self._cache
        self._cache = ActivationCache(layer, features, prefixes)
        try:
            yield self._cache
        finally:
            self._cache = before

    def by_length(self, queries: Iterable[Query]) -> list[Query]:
        """Return the distinct queries by their number of tokens, so that little of a batch is padding."""
        distinct = dict.fromkeys(queries)
        return sorted(distinct, key=lambda query: len(self.encode(query).ids))

    @contextmanager
    def _pass(self, batch: Batch, deepstack: DeepStack | None = None) -> Iterator[None]:
        """Inside the block, `current_batch` is the batch, and its image tokens are added behind the first layers."""
        for look in self.before_pass:
            look(batch)
        before = self.current_batch
        self.current_batch = batch
        try:
            with nullcontext() if deepstack is None else deepstack.on(self.layers):
                yield
        finally:
            self.current_batch = before

    def _run_stack(self, embeds: Tensor, batch: Batch) -> Tensor:
        output = self._stack(
            inputs_embeds=embeds,
            attention_mask=batch.attention_mask,
            use_cache=False,
            **self._beside(batch),
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _beside(self, batch: Batch) -> dict[str, Tensor]:
        """Return what goes into the decoder beside embeddings and mask, in `generate` too."""
        positions = self.position_ids(batch)
        return {} if positions is None else {"position_ids": positions}

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer <= self.n_layers:
            raise ModelError(
                f"layer {layer}: {self.name} has the layers 0 to {self.n_layers - 1}"
            )

    # -- generation ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        queries: Sequence[Query],
        *,
        max_new_tokens: int | Sequence[int] = 32,
        streamer: Any = None,
        sampling: str = "greedy",
    ) -> list[str]:
        """Return the answer to each query, cut at the end token or the first newline, and stripped.

        `max_new_tokens` is one limit, or one for each query. Answers are greedy, the arg-max at every step, whatever
        the model's generation_config says; `sampling="model"` follows its settings instead. A `streamer` gets the
        tokens of all queries, (B,), as they come. Raises NotFinite if the logits are NaN.
        """
        batch = self.batch(queries, with_answer=False, left_pad=True)
        if isinstance(max_new_tokens, int):
            max_new_tokens = [max_new_tokens] * len(queries)
        room = self.max_length - batch.input_ids.shape[1]
        if room < 1:
            raise DataError(
                f"{self.name} reads {self.max_length} tokens: no room for an answer to the longest prompt"
            )
        longest = min(max(max_new_tokens), room)
        tokens = self._continue(batch, longest, streamer, sampling)
        pairs = zip(tokens.tolist(), max_new_tokens, strict=True)
        return [self.decode(row[:limit]) for row, limit in pairs]

    def _continue(
        self, batch: Batch, limit: int, streamer: Any, sampling: str
    ) -> Tensor:
        """Return at most `limit` tokens that follow each row of a left-padded batch: (B, limit)."""
        from transformers import (
            GenerationConfig,
            LogitsProcessorList,
            StoppingCriteriaList,
        )

        fixed = {
            "max_new_tokens": limit,
            "pad_token_id": self.pad_id,
            "eos_token_id": self._end_ids,
        }
        config = GenerationConfig(do_sample=False, **fixed)
        if sampling == "model":
            config = sampling_config(self.own_settings, **fixed)
        total = torch.zeros((), device=self.device)

        def add_up(_ids: Tensor, scores: Tensor) -> Tensor:
            """Add up all logits: the sum is looked at once, at the end, so that no step waits for the device."""
            numbers = scores
            if sampling != "greedy":  # a model's own settings forbid tokens with -inf
                numbers = scores.nan_to_num(nan=torch.nan, neginf=0.0)
            total.add_(numbers.sum(dtype=torch.float32).to(total.device))
            return scores

        def ends_a_line(ids: Tensor, _scores: Tensor, **_options: Any) -> Tensor:
            return self._newline[ids[:, -1]]

        options = {"tokenizer": self.tokenizer} if config.stop_strings else {}
        embeds, deepstack = self._entering(batch)
        with (
            self._pass(batch, deepstack),
            set_aside(self.generator),
            self._following(sampling),
        ):
            tokens = self._generated(
                embeds,
                batch,
                generation_config=config,
                logits_processor=LogitsProcessorList([add_up]),
                stopping_criteria=StoppingCriteriaList([ends_a_line]),
                streamer=streamer,
                **options,
            )
        if not total.isfinite():
            raise self._not_finite(batch)
        return tokens

    def continued(self, batch: Batch, limit: int) -> Tensor:
        """Return at most `limit` tokens that follow each row of a left-padded batch, greedily: (B, n)."""
        return self._continue(batch, limit, None, "greedy")

    def _generated(self, embeds: Tensor, batch: Batch, **options: Any) -> Tensor:
        """Return the tokens that `generate` of transformers puts behind a batch: (B, n)."""
        tokens: Tensor = self.generator.generate(
            inputs_embeds=embeds,
            attention_mask=batch.attention_mask,
            **self._beside(batch),
            **options,
        )
        return tokens

    @contextmanager
    def _following(self, sampling: str) -> Iterator[None]:
        """Inside the block, sampling is seeded, and settings of the model that cannot be followed are a ModelError.

        Penalties count the tokens of the answer alone, because the question enters as embeddings; transformers warns
        of it.
        """
        if sampling == "greedy":
            yield
            return
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            torch.manual_seed(0)
            try:
                yield
            except (ValueError, RuntimeError, IndexError, TypeError) as error:
                raise ModelError(
                    f"{self.name}: its own settings ({described(self.own_settings)}) cannot be followed: {error}",
                    "--sampling greedy",
                ) from error

    @cached_property
    def own_settings(self) -> dict[str, Any]:
        """What the model's generation_config asks for, and greedy answers ignore."""
        return own_settings(self.model, self.generator)

    @cached_property
    def _end_ids(self) -> list[int]:
        config = getattr(self.generator, "generation_config", None)
        ids = getattr(config, "eos_token_id", None)
        if not isinstance(ids, list):
            ids = [ids, self.tokenizer.eos_token_id]
        return sorted({i for i in ids if i is not None})

    @cached_property
    def _newline(self) -> Tensor:
        """(V,) bool: the tokens with a newline in them."""
        head = self.model.get_output_embeddings()
        size = len(head.weight)
        known = min(size, len(self.tokenizer))  # a model may have spare rows
        tokens = [[token] for token in range(known)]
        flags = torch.zeros(size, dtype=torch.bool)
        for token, text in enumerate(self.tokenizer.batch_decode(tokens)):
            flags[token] = "\n" in text
        return flags.to(self.device)

    @property
    def end_id(self) -> int:
        """The token that ends an answer."""
        eos: int = self.tokenizer.eos_token_id
        return eos if eos in self._end_ids else self._end_ids[0]

    def is_end(self, token: int) -> bool:
        """Whether this token ends an answer and is no part of it."""
        return token in self._end_ids

    def stops(self, token: int) -> bool:
        """Whether an answer ends with this token: an end token, or one with a newline in it."""
        return self.is_end(token) or bool(self._newline[token])

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of generated tokens, cut at the end token or the first newline, and stripped."""
        length = 0
        for token in tokens:
            if token in self._end_ids:
                break
            length += 1
        text = self.tokenizer.decode(
            tokens[:length],
            skip_special_tokens=True,
        )
        first_line, _, _ = str(text).strip("\r ").partition("\n")
        return first_line.strip()


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    """Return the dotted name of a module inside a model."""
    for name, module in model.named_modules():
        if module is wanted:
            return str(name)
    raise ModelError(f"{type(model).__name__} has no module {type(wanted).__name__}")
