"""What the untouched model says that pictures show, asked before a forward pass and once a picture where it can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from mmedit_cli.errors import UserError
from mmedit_cli.knowledge.methods.liveedit.names import LENGTH, likeliest, no_names
from mmedit_cli.knowledge.methods.shared.unrelated import EMPTY_PICTURE
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.batch import Batch, Encoded, collate
from mmedit_cli.pictures import Picture
from mmedit_cli.types import Query


class Naming:
    """Asks one model one question about pictures; whoever calls it sees to it that no edit takes part in the answers.

    Inside `cached_activations` each picture is asked about once.
    """

    def __init__(self, backbone: VisionLanguageModel, question: str) -> None:
        self._backbone = backbone
        self._question = question
        self._latest: tuple[Batch, Tensor] | None = None

    @torch.no_grad()
    def of(self, batch: Batch) -> Tensor:
        """Return the names of each row's picture, as `names.py` has them: (B, n, 1 + 2 L)."""
        if self._latest is None or self._latest[0] is not batch:
            self._latest = (batch, self._ask(batch))
        return self._latest[1]

    def forget(self) -> None:
        """Forget what was said: the model may have changed."""
        self._latest = None

    def exported(self) -> dict[str, Any]:
        """Return what an exported model asks with: the tokens before and behind a picture, the end, and the head.

        Raises UserError for a model that gives positions or image tokens to its layers that only it knows.
        """
        backbone = self._backbone
        query = Query(self._question, image=EMPTY_PICTURE)
        batch = backbone.batch([query], with_answer=False)
        if backbone.position_ids(batch) is not None or backbone.n_deepstack:
            raise UserError(
                f"liveedit: {backbone.name} gives its layers positions or image tokens of its own, which exported "
                "edits do not know when they ask for the names of pictures",
                "mmedit serve --edits answers with them; or edit with --set naming=null",
            )
        encoded = backbone.encode(query, with_answer=False)
        vocabulary = range(backbone.model.config.get_text_config().vocab_size)
        start = encoded.image_start
        end = start + encoded.n_image
        return {
            "naming": (encoded.ids[:start], encoded.ids[end:]),
            "end": backbone.end_id,
            "stops": [token for token in vocabulary if backbone.stops(token)],
            "head": backbone.anchors.tail[-1],
        }

    def _ask(self, batch: Batch) -> Tensor:
        backbone = self._backbone
        by_picture = backbone.by_picture(self._question, self._say, batch.pictures)
        rows = no_names(len(batch.queries))
        for row, index in enumerate(batch.picture_of):
            if index is not None:
                rows[row] = by_picture[index]
        return rows.to(backbone.device)

    def _say(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """Return the name of each picture: (n, 1 + 2 L) each."""
        backbone = self._backbone
        names = list(no_names(len(pictures)))
        asked = [
            Query(self._question, image=picture.path, background=picture.background)
            for picture in pictures
        ]
        batch = backbone.batch(asked, with_answer=False, left_pad=True)
        room = backbone.max_length - batch.input_ids.shape[1]
        if room < 1:
            return names
        tokens = backbone.continued(batch, min(LENGTH, room))
        said: dict[int, Encoded] = {}
        for place, row in enumerate(tokens.tolist()):
            name = list(takewhile(lambda token: not backbone.stops(token), row))
            if name:
                question = backbone.encode(asked[place], with_answer=False)
                ids = [*question.ids, *name]
                said[place] = replace(question, ids=ids, n_answer=len(name))
        if not said:
            return names
        named = [asked[place] for place in said]
        rows = list(said.values())
        whole = collate(named, rows, backbone.pad_id, backbone.device)
        logits = backbone.logits(whole)
        at, following = whole.target_positions(backbone.end_id)
        for row, place in enumerate(said):
            # the end of a name that has n tokens already is not looked at
            spoken = following[row, at[row]][:LENGTH]
            found = likeliest(logits[row, at[row]][:LENGTH])
            name_of = torch.cat((spoken[:, None].to(found.dtype), found), 1)
            names[place][: len(name_of)] = name_of.cpu()
        return names
