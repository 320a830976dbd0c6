"""The keys by which Multi-MELO and MELO route queries: features of the model itself, or of other encoders.

B queries, T tokens, D width of the model. A key never depends on the answer of a query (but for `leaky`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmedit_cli.errors import ModelError
from mmedit_cli.knowledge.methods.multi_melo.index import SMALLEST_COSINES, Keys, unit
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.batch import Batch, Encoded, collate
from mmedit_cli.model_folder import read_config
from mmedit_cli.pictures import Picture, load_picture
from mmedit_cli.types import Query

_KEPT = 1 << 16  # keys of questions and pictures that are kept


class KeySource(ABC):
    """Makes the keys of a batch from what enters decoder layer `layer` of the model."""

    def __init__(self, backbone: VisionLanguageModel, layer: int) -> None:
        self.backbone, self.layer = backbone, layer

    @abstractmethod
    def keys(self, hidden: Tensor, batch: Batch) -> Keys:
        """Return the keys of a batch; hidden: (B, T, D), on entering the layer, all of the sequence."""


class TokenKeys(KeySource):
    """MELO's key: the hidden state of the last token of the question, as it is."""

    def keys(self, hidden: Tensor, batch: Batch) -> Keys:
        """Return the part `token`: (B, D)."""
        question = batch.prompt_mask | batch.image_mask
        token = last(hidden, question)
        seen = batch.image_mask.any(1)
        return Keys({"token": token.float()}, seen)


class BackboneKeys(KeySource):
    """The features of the model itself, so that no third model is needed; only `question` costs a pass of its own.

    image: the mean state of the image tokens; state: that of the last token of the question, which has read the
    picture; question: the same when the model reads the question without its picture. States are layer-normed.
    """

    def __init__(self, backbone: VisionLanguageModel, layer: int) -> None:
        super().__init__(backbone, layer)
        self._questions: dict[tuple[int, ...], Tensor] = {}
        self._frame = backbone.frame

    def keys(self, hidden: Tensor, batch: Batch) -> Keys:
        """Return the parts question, image and state: (B, D) each."""
        return own_keys(
            hidden,
            batch.prompt_mask,
            batch.image_mask,
            alone=partial(self._alone, batch),
        )

    def _alone(self, batch: Batch, rows: Sequence[int]) -> Tensor:
        """Return the states of questions that are read without their pictures: (n, D). Each is read once."""
        words = batch.attention_mask.bool() & ~batch.answer_mask
        wanted: list[tuple[int, ...]] = []
        for row in rows:
            tokens = without_picture(
                batch.input_ids[row],
                words[row],
                batch.image_mask[row],
                self._frame,
            )
            wanted.append(tokens)
        distinct = list(dict.fromkeys(wanted))
        missing = [tokens for tokens in distinct if tokens not in self._questions]
        if missing and len(self._questions) > _KEPT:
            self._questions.clear()
            missing = distinct
        if missing:
            states = self._read(missing)
            self._questions.update(zip(missing, states, strict=True))
        return torch.stack([self._questions[tokens] for tokens in wanted])

    @torch.no_grad()
    def _read(self, questions: Sequence[tuple[int, ...]]) -> Tensor:
        """Return the states of questions that are given as tokens: (n, D)."""
        backbone = self.backbone
        encoded = [
            Encoded(
                list(tokens),
                image_start=0,
                n_image=0,
                n_answer=0,
            )
            for tokens in questions
        ]
        batch = collate(
            [Query("")] * len(questions),
            encoded,
            backbone.pad_id,
            backbone.device,
        )
        prefix = backbone.prefix(batch, 0)
        hidden = backbone.advance(prefix, self.layer).hidden
        return state_of(hidden, batch.prompt_mask)


class HubKeys(KeySource):
    """Multi-MELO's encoders: a sentence vector (BGE) of the question, and a vector of the picture.

    That is the class logits of DINOv2 or a ViT, or the projected embedding of CLIP.

    `leaky` puts the answer of a query into its key, as the published code does for captions: for comparisons only.
    """

    def __init__(
        self,
        backbone: VisionLanguageModel,
        layer: int,
        *,
        text: str,
        image: str,
        leaky: bool,
    ) -> None:
        super().__init__(backbone, layer)
        self._text_name = text
        self._image_name = image
        self._leaky = leaky
        self._vectors: dict[Hashable, Tensor] = {}

    def keys(self, hidden: Tensor, batch: Batch) -> Keys:
        """Return the parts question and image: (B, D) each; the hidden state is not used."""
        texts = [self._text_of(query) for query in batch.queries]
        pictures = [_picture_of(query) for query in batch.queries]
        seen = [picture for picture in pictures if picture is not None]
        self._compute(texts, self._embed_texts)
        self._compute(seen, self._embed_pictures)
        encoder, _ = self._image_encoder
        config = encoder.config
        width = config.projection_dim if self._is_clip else config.num_labels
        blank = torch.zeros(width, device=hidden.device)
        questions = [self._vectors[text] for text in texts]
        images = [
            blank if picture is None else self._vectors[picture] for picture in pictures
        ]
        parts = {"question": torch.stack(questions), "image": torch.stack(images)}
        return Keys(parts, batch.image_mask.any(1))

    def _text_of(self, query: Query) -> str:
        if self._leaky and query.target:
            return f"{query.prompt} {query.target}"
        return query.prompt

    def _compute(
        self, wanted: Sequence[Hashable], embed: Callable[[list[Any]], Tensor]
    ) -> None:
        """Embed what has no vector yet, each once."""
        distinct = dict.fromkeys(wanted)
        missing = [item for item in distinct if item not in self._vectors]
        if missing:
            with torch.no_grad():
                vectors = unit(embed(missing))
            self._vectors.update(zip(missing, vectors, strict=True))

    def _embed_texts(self, texts: list[str]) -> Tensor:
        model, tokenizer = self._text_encoder
        inputs = tokenizer(
            texts,
            padding=True,
            truncation=True,
            return_tensors="pt",
        )
        states: Tensor = model(**inputs.to(self.backbone.device)).last_hidden_state
        return states[:, 0]  # BGE: the first token

    def _embed_pictures(self, pictures: list[Picture]) -> Tensor:
        model, processor = self._image_encoder
        images = [load_picture(picture) for picture in pictures]
        inputs = processor(
            images=images,
            return_tensors="pt",
        )
        found = model(**inputs.to(self.backbone.device))
        vectors: Tensor = found.image_embeds if self._is_clip else found.logits
        return vectors

    @property
    def smallest_cosine(self) -> float:
        """The least cosine of two pictures by the published constants; raise ModelError for an encoder without one."""
        if self._image_type not in SMALLEST_COSINES:
            known = ", ".join(SMALLEST_COSINES)
            raise ModelError(
                f"image_encoder: {self._image_name} is a {self._image_type}: mode: reference has no constant for it",
                f"it has those of {known}; mode: correct needs none",
            )
        return SMALLEST_COSINES[self._image_type]

    @cached_property
    def _image_type(self) -> str:
        return str(read_config(_folder(self._image_name)).get("model_type"))

    @property
    def _is_clip(self) -> bool:
        return self._image_type == "clip"

    @cached_property
    def _text_encoder(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer

        folder = _folder(self._text_name)
        model = _loaded(AutoModel, folder)
        return self._ready(model), _loaded(AutoTokenizer, folder)

    @cached_property
    def _image_encoder(self) -> tuple[Any, Any]:
        import transformers
        from transformers import AutoImageProcessor

        # each with its own class: a CLIP would get a head of random classes
        kind = (
            transformers.CLIPVisionModelWithProjection
            if self._is_clip
            else transformers.AutoModelForImageClassification
        )
        folder = _folder(self._image_name)
        model = _loaded(kind, folder)
        processor = _loaded(
            AutoImageProcessor,
            folder,
            backend="pil",
        )
        return self._ready(model), processor

    def _ready(self, model: Any) -> Any:
        return model.to(self.backbone.device).eval().requires_grad_(False)


def own_keys(
    hidden: Tensor, prompt: Tensor, image: Tensor, alone: Callable[[list[int]], Tensor]
) -> Keys:
    """Return the parts question, image and state from the model's own features: (B, D) each.

    hidden: (B, T, D); prompt, image: (B, T) bool. `alone` returns for some rows, (n, D), the states of their questions
    when they are read without their pictures.
    """
    seen = image.any(1)
    state = state_of(hidden, prompt | image)
    mask = image.unsqueeze(-1)
    total = (_normed(hidden) * mask).sum(1)
    count = mask.sum(1).clamp(min=1)
    mean = total / count
    question = state.clone()  # of a question without a picture they are the same
    rows = seen.nonzero()[:, 0].tolist()
    if rows:
        question[rows] = alone(rows)
    parts = {"question": question, "image": unit(mean), "state": state}
    return Keys(parts, seen)


def without_picture(
    ids: Tensor,
    words: Tensor,
    image: Tensor,
    frame: tuple[Sequence[int], Sequence[int]],
) -> tuple[int, ...]:
    """Return the tokens of a question with a picture as if it had none: without the image tokens and their frame.

    ids, words, image: (T,), the last two bool: what belongs to the question, and which of that is the picture.
    """
    places = image.nonzero()[:, 0]
    start = places[0]
    end = places[-1]
    number = torch.arange(len(ids), device=ids.device)
    in_front = words & (number < start)
    follows = words & (number > end)
    before = ids[in_front].tolist()
    behind = ids[follows].tolist()
    opening = list(frame[0])
    closing = list(frame[1])
    if opening and before[-len(opening) :] == opening:
        before = before[: -len(opening)]
    if behind[: len(closing)] == closing:
        behind = behind[len(closing) :]
    return (*before, *behind)


def state_of(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the direction of the layer-normed state of the last marked token: (B, T, D), (B, T) bool -> (B, D)."""
    return unit(_normed(last(hidden, mask)))


def last(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the state of the last marked token of each row: (B, T, D), (B, T) bool -> (B, D)."""
    device = hidden.device
    places = torch.arange(hidden.shape[1], device=device)
    marked = torch.where(mask, places, -1)
    at = marked.amax(1)
    rows = torch.arange(len(hidden), device=device)
    return hidden[rows, at]


def _normed(hidden: Tensor) -> Tensor:
    return F.layer_norm(hidden.float(), hidden.shape[-1:])


def _picture_of(query: Query) -> Picture | None:
    if query.image is None:
        return None
    return Picture(query.image, query.background)


def _folder(name: str) -> Path:
    from mmedit_cli.catalog import hub_folder

    return Path(name) if Path(name).is_dir() else hub_folder(name, None)


def _loaded(kind: Any, folder: Path, **options: Any) -> Any:
    from mmedit_cli.model_folder import loading

    with loading(
        folder,
        problem="cannot be used as an encoder",
        hint="router=backbone needs none",
    ):
        return kind.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **options
        )
