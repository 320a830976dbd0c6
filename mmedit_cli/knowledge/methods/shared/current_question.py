"""The question in a forward pass, for editors that decide once a question which edit it is about."""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import Tensor

from mmedit_cli.errors import MmeditError
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.batch import Batch

Decided = TypeVar("Decided")


class Decision(Generic[Decided]):
    """What an editor decides when a whole question is read; it holds for every token that is generated after it.

    `latest` is the batch that was last decided about, and what was decided.
    """

    def __init__(self, backbone: VisionLanguageModel, editor: str) -> None:
        self._backbone = backbone
        self._editor = editor
        self.latest: tuple[Batch, Decided] | None = None

    @property
    def batch(self) -> Batch:
        """The batch in a forward pass; raises MmeditError where the model was called behind the backbone's back."""
        batch = self._backbone.current_batch
        if batch is None:
            problem = f"{self._editor} must know the question and where its picture is"
            raise MmeditError(
                f"{problem}: ask the backbone, not the model inside",
                "use backbone.generate(queries) or backbone.logits(batch)",
            )
        return batch

    def is_due(self, states: Tensor) -> bool:
        """Whether states (B, T, D) are of whole questions, not of tokens that are generated."""
        return states.shape[1] == self.batch.input_ids.shape[1]

    def make(self, decided: Decided) -> None:
        """Decide about the batch in the forward pass."""
        self.latest = (self.batch, decided)

    @property
    def made(self) -> Decided:
        """What was decided about the batch in the forward pass; raises MmeditError if its beginning was not seen."""
        if self.latest is None or self.latest[0] is not self.batch:
            raise MmeditError(
                f"{self._editor} met a part of a sequence whose beginning it has not seen"
            )
        return self.latest[1]

    def forget(self) -> None:
        """Forget what was decided: the edits have changed."""
        self.latest = None
