"""What Multi-MELO and MELO tell queries apart by: the features of the model itself, or of encoders beside it.

B queries, T tokens, D width of the model. A key never depends on the answer of a query (but for `leaky`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmedit_cli.knowledge.methods.multi_melo.index import Keys, unit
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.batch import Batch, Encoded, collate
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
        token = last(hidden, batch.prompt_mask | batch.image_mask).float()
        return Keys({"token": token}, batch.image_mask.any(1))


class BackboneKeys(KeySource):
    """The model's own features, so that no third model is needed; all but `question` come free with the pass.

    image: the mean state of the image tokens; state: that of the last token of the question, which has read the
    picture; question: the same when the model reads the question alone, that is its tokens without the picture's.
    States are layer-normed.
    """

    def __init__(self, backbone: VisionLanguageModel, layer: int) -> None:
        super().__init__(backbone, layer)
        self._questions: dict[tuple[int, ...], Tensor] = {}
        self._frame = backbone.frame

    def keys(self, hidden: Tensor, batch: Batch) -> Keys:
        """Return the parts question, image and state: (B, D) each."""
        return own_keys(
            hidden, batch.prompt_mask, batch.image_mask, partial(self._alone, batch)
        )

    def _alone(self, batch: Batch, rows: Sequence[int]) -> Tensor:
        """Return the states of questions that are read without their pictures: (n, D). Each is read once."""
        words = batch.attention_mask.bool() & ~batch.answer_mask
        wanted = [
            without_picture(
                batch.input_ids[i], words[i], batch.image_mask[i], self._frame
            )
            for i in rows
        ]
        missing = [ids for ids in dict.fromkeys(wanted) if ids not in self._questions]
        if missing:
            if len(self._questions) > _KEPT:
                self._questions.clear()
                missing = list(dict.fromkeys(wanted))
            encoded = [Encoded(list(ids), 0, 0, 0) for ids in missing]
            alone = collate(
                [Query("")] * len(missing),
                encoded,
                self.backbone.pad_id,
                self.backbone.device,
            )
            with torch.no_grad():
                hidden = self.backbone.advance(
                    self.backbone.prefix(alone, 0), self.layer
                ).hidden
            self._questions.update(
                zip(missing, state_of(hidden, alone.prompt_mask), strict=True)
            )
        return torch.stack([self._questions[ids] for ids in wanted])


class HubKeys(KeySource):
    """Multi-MELO's encoders: a sentence vector (BGE) of the question, DINOv2's class logits of the picture.

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
        self._text_name, self._image_name, self._leaky = text, image, leaky
        self._vectors: dict[Any, Tensor] = {}

    def keys(self, hidden: Tensor, batch: Batch) -> Keys:
        """Return the parts question and image: (B, D) each; the hidden state is not used."""
        texts = [
            q.prompt + (f" {q.target}" if self._leaky and q.target else "")
            for q in batch.queries
        ]
        pictures = [
            None if q.image is None else Picture(q.image, q.background)
            for q in batch.queries
        ]
        self._compute(
            [text for text in texts if text not in self._vectors], self._embed_texts
        )
        self._compute(
            [p for p in pictures if p is not None and p not in self._vectors],
            self._embed_pictures,
        )
        blank = torch.zeros(
            self._image_encoder[0].config.num_labels, device=hidden.device
        )
        image = [
            blank if picture is None else self._vectors[picture] for picture in pictures
        ]
        question = torch.stack([self._vectors[text] for text in texts])
        return Keys(
            {"question": question, "image": torch.stack(image)}, batch.image_mask.any(1)
        )

    def _compute(self, missing: Sequence[Any], embed: Any) -> None:
        distinct = list(dict.fromkeys(missing))
        if distinct:
            with torch.no_grad():
                self._vectors.update(zip(distinct, unit(embed(distinct)), strict=True))

    def _embed_texts(self, texts: list[str]) -> Tensor:
        model, tokenizer = self._text_encoder
        inputs = tokenizer(
            texts, padding=True, truncation=True, return_tensors="pt"
        ).to(self.backbone.device)
        return model(**inputs).last_hidden_state[:, 0]  # type: ignore[no-any-return]  # BGE: the first token

    def _embed_pictures(self, pictures: list[Picture]) -> Tensor:
        model, processor = self._image_encoder
        inputs = processor(
            images=[load_picture(picture) for picture in pictures], return_tensors="pt"
        )
        return model(**inputs.to(self.backbone.device)).logits  # type: ignore[no-any-return]

    @cached_property
    def _text_encoder(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer

        folder = _folder(self._text_name)
        return self._ready(_loaded(AutoModel, folder)), _loaded(AutoTokenizer, folder)

    @cached_property
    def _image_encoder(self) -> tuple[Any, Any]:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        folder = _folder(self._image_name)
        model = self._ready(_loaded(AutoModelForImageClassification, folder))
        return model, _loaded(AutoImageProcessor, folder, backend="pil")

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
    mean = (_normed(hidden) * mask).sum(1) / mask.sum(1).clamp(min=1)
    question = state.clone()  # of a question without a picture they are the same
    rows = seen.nonzero()[:, 0].tolist()
    if rows:
        question[rows] = alone(rows)
    return Keys({"question": question, "image": unit(mean), "state": state}, seen)


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
    at = torch.arange(len(ids), device=ids.device)
    before, behind = (
        ids[words & (at < places[0])].tolist(),
        ids[words & (at > places[-1])].tolist(),
    )
    opening, closing = map(list, frame)
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
    places = torch.arange(hidden.shape[1], device=hidden.device)
    at = torch.where(mask, places, -1).amax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), at]


def _normed(hidden: Tensor) -> Tensor:
    return F.layer_norm(hidden.float(), hidden.shape[-1:])


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
