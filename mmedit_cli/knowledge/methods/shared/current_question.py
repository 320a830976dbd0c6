"""The question in a forward pass, for editors that decide once a question which edit it is about."""

from __future__ import annotations

from mmedit_cli.errors import MmeditError
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.batch import Batch


def asked_batch(backbone: VisionLanguageModel, editor: str) -> Batch:
    """Return the batch in a forward pass; raise MmeditError where the model was called behind the backbone's back."""
    batch = backbone.current_batch
    if batch is None:
        problem = f"{editor} must know the question and where its picture is"
        raise MmeditError(
            f"{problem}: ask the backbone, not the model inside",
            "use backbone.generate(queries) or backbone.logits(batch)",
        )
    return batch


def beginning_unseen(editor: str) -> MmeditError:
    """Return the error of an editor that is given later tokens of a question it has not decided about."""
    return MmeditError(
        f"{editor} met a part of a sequence whose beginning it has not seen"
    )
