"""What trained editors share that keep their edits as rows, and send each question to one edit or to none."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from mmedit_cli.knowledge.methods.base import TrainedEditor, check_shapes
from mmedit_cli.knowledge.methods.shared.edit_rows import EditRows
from mmedit_cli.types import Query


class RowEditor(TrainedEditor):
    """A trained editor whose edits are independent rows of tensors, in order."""

    independent = True
    _rows: EditRows

    @abstractmethod
    def _add(self, rows: Mapping[str, Tensor], requests: Sequence[Query]) -> None:
        """Add edits with a row in each tensor, and change the model where these are the first."""

    @abstractmethod
    def _places(self, queries: Sequence[Query]) -> list[int]:
        """Return for each query the row of the edit that it is about, -1 for none."""

    def routes(self, queries: Sequence[Query]) -> list[int | None]:
        """Return for each query the id of the edit that it is about, None where the base model answers."""
        if not self.operations:
            return [None] * len(queries)
        ids = self.ids
        return [ids[place] if place >= 0 else None for place in self._places(queries)]

    def affects(self, queries: Sequence[Query]) -> list[bool]:
        """Return for each query whether it is about an edit."""
        return [edit is not None for edit in self.routes(queries)]

    def _keep(self, positions: Sequence[int]) -> bool:
        requests = [self.requests[i] for i in positions]
        rows = self._rows.taken(positions)
        self._reset()
        self._add(rows, requests)
        return True

    def _tensors(self) -> dict[str, Tensor]:
        return dict(self._rows.tensors)

    def _load_tensors(
        self, tensors: Mapping[str, Tensor], requests: Sequence[Query]
    ) -> None:
        if not requests:
            return
        count = len(requests)
        what = f"{count} edits of this {self.name}"
        check_shapes(tensors, self._rows.wanted(count), what)
        device = self.backbone.device
        rows = {name: tensor.to(device) for name, tensor in tensors.items()}
        self._add(rows, requests)
