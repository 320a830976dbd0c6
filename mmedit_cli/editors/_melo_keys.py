"""What Multi-MELO and MELO tell queries apart by: the features of the model itself, or of encoders beside it.

B queries, T tokens, D width of the model. A key never depends on the answer of a query (but for `leaky`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmedit_cli.backbones._batch import Batch
from mmedit_cli.backbones.base import VisionLanguageModel
from mmedit_cli.editors._melo_index import Keys, unit
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
        return Keys({"token": last_of_prompt(hidden, batch).float()}, batch.image_mask.any(1))


class BackboneKeys(KeySource):
    """The model's own features, so that no third model is needed; all but `question` come free with the pass.

    image: the mean state of the image tokens; state: that of the last token of the question, which has read the
    picture; question: the same when the model reads the question alone. States are layer-normed.
    """

    def __init__(self, backbone: VisionLanguageModel, layer: int) -> None:
        super().__init__(backbone, layer)
        self._questions: dict[tuple[str, bool], Tensor] = {}

    def keys(self, hidden: Tensor, batch: Batch) -> Keys:
        """Return the parts question, image and state: (B, D) each."""
        seen = batch.image_mask.any(1)
        state = unit(_normed(last_of_prompt(hidden, batch)))
        mask = batch.image_mask.unsqueeze(-1)
        image = (_normed(hidden) * mask).sum(1) / mask.sum(1).clamp(min=1)
        question = state.clone()  # of a question without a picture they are the same
        rows = seen.nonzero()[:, 0].tolist()
        if rows:
            question[rows] = self._alone([batch.queries[row] for row in rows])
        return Keys({"question": question, "image": unit(image), "state": state}, seen)

    def _alone(self, queries: Sequence[Query]) -> Tensor:
        """Return the states of questions that are read without their pictures: (n, D). Each is read once."""
        wanted = [(query.prompt, query.chat) for query in queries]
        missing = [name for name in dict.fromkeys(wanted) if name not in self._questions]
        if missing:
            if len(self._questions) > _KEPT:
                self._questions.clear()
                missing = list(dict.fromkeys(wanted))
            batch = self.backbone.batch([Query(p, chat=chat) for p, chat in missing], with_answer=False)
            with torch.no_grad():
                hidden = self.backbone.advance(self.backbone.prefix(batch, 0), self.layer).hidden
            self._questions.update(zip(missing, unit(_normed(last_of_prompt(hidden, batch))), strict=True))
        return torch.stack([self._questions[name] for name in wanted])


class HubKeys(KeySource):
    """Multi-MELO's encoders: a sentence vector (BGE) of the question, DINOv2's class logits of the picture.

    `leaky` puts the answer of a query into its key, as the published code does for captions: for comparisons only.
    """

    def __init__(self, backbone: VisionLanguageModel, layer: int, *, text: str, image: str, leaky: bool) -> None:
        super().__init__(backbone, layer)
        self._text_name, self._image_name, self._leaky = text, image, leaky
        self._vectors: dict[Any, Tensor] = {}

    def keys(self, hidden: Tensor, batch: Batch) -> Keys:
        """Return the parts question and image: (B, D) each; the hidden state is not used."""
        texts = [q.prompt + (f" {q.target}" if self._leaky and q.target else "") for q in batch.queries]
        pictures = [None if q.image is None else Picture(q.image, q.background) for q in batch.queries]
        self._compute([text for text in texts if text not in self._vectors], self._embed_texts)
        self._compute([p for p in pictures if p is not None and p not in self._vectors], self._embed_pictures)
        blank = torch.zeros(self._image_encoder[0].config.num_labels, device=hidden.device)
        image = [blank if picture is None else self._vectors[picture] for picture in pictures]
        question = torch.stack([self._vectors[text] for text in texts])
        return Keys({"question": question, "image": torch.stack(image)}, batch.image_mask.any(1))

    def _compute(self, missing: Sequence[Any], embed: Any) -> None:
        distinct = list(dict.fromkeys(missing))
        if distinct:
            with torch.no_grad():
                self._vectors.update(zip(distinct, unit(embed(distinct)), strict=True))

    def _embed_texts(self, texts: list[str]) -> Tensor:
        model, tokenizer = self._text_encoder
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.backbone.device)
        return model(**inputs).last_hidden_state[:, 0]  # type: ignore[no-any-return]  # BGE: the first token

    def _embed_pictures(self, pictures: list[Picture]) -> Tensor:
        model, processor = self._image_encoder
        inputs = processor(images=[load_picture(picture) for picture in pictures], return_tensors="pt")
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


def last_of_prompt(hidden: Tensor, batch: Batch) -> Tensor:
    """Return the state of the last token of each question: (B, T, D) -> (B, D)."""
    places = torch.arange(hidden.shape[1], device=hidden.device)
    last = torch.where(batch.prompt_mask | batch.image_mask, places, -1).amax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def _normed(hidden: Tensor) -> Tensor:
    return F.layer_norm(hidden.float(), hidden.shape[-1:])


def _folder(name: str) -> Path:
    from mmedit_cli.catalog import hub_folder

    return Path(name) if Path(name).is_dir() else hub_folder(name, None)


def _loaded(kind: Any, folder: Path, **options: Any) -> Any:
    from mmedit_cli.errors import ModelError

    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise ModelError(f"{folder}: cannot be used as an encoder: {reason}", "router=backbone needs none") from error
