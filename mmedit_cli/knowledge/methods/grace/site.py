"""The feed-forward part (FFN) that the codebook wraps: what enters it is the key, what leaves it is replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mmedit_cli.patch import Patch


@dataclass(frozen=True)
class WrappedFfn:
    """The FFN of one decoder layer by the paths of the modules that are entered and left.

    rows: says how many sequences the pass under way has.
    """

    entered: str
    left: str
    rows: Callable[[], int]

    def hook(
        self,
        patch: Patch,
        read: Callable[[Tensor], None],
        replace: Callable[[Tensor], Tensor | None],
    ) -> None:
        """Give `read` what enters and pass what leaves through `replace`: (B, T, D); None: not a bit changes.

        OPT gives its FFN one row for all tokens of a batch; both get them by sequence all the same.
        """

        def enter(entering: Tensor) -> None:
            read(self._by_sequence(entering))

        def leave(leaving: Tensor) -> Tensor | None:
            replaced = replace(self._by_sequence(leaving))
            return None if replaced is None else replaced.reshape(leaving.shape)

        patch.hook_input(self.entered, enter)
        patch.hook(self.left, leave)

    def _by_sequence(self, hidden: Tensor) -> Tensor:
        return hidden.reshape(self.rows(), -1, hidden.shape[-1])
