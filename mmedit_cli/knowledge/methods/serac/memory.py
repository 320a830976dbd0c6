"""What SERAC keeps of its edits, and how a query is compared with them.

B queries, E edits, S tokens of an answer at most, D width of the model, C values of a code.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmedit_cli.errors import DataError
from mmedit_cli.knowledge.methods.serac.networks import SeracNetworks
from mmedit_cli.knowledge.methods.shared.attention import first_valid, span
from mmedit_cli.knowledge.methods.shared.edit_rows import EditRows
from mmedit_cli.knowledge.methods.shared.scope import Scope, about
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.batch import Prefix


@dataclass(frozen=True)
class Answers:
    """What the counterfactual model reads of edits: states (E, S, D), words (E, S) ids, used (E, S) bool.

    A state is what the model has in mind where a token of the answer is to be given, on leaving its last layer.
    """

    states: Tensor
    words: Tensor
    used: Tensor

    def of(self, edits: Tensor) -> Answers:
        """Return those of some edits: (n,) -> n of each."""
        return Answers(
            self.states[edits],
            self.words[edits],
            self.used[edits],
        )


def answers_of(
    backbone: VisionLanguageModel, prefix: Prefix, most: int, *, teach_end: bool
) -> Answers:
    """Return what is kept of requests, from their states on leaving the last layer.

    Raises DataError for an answer of more than `most` tokens.
    """
    batch = prefix.batch
    at, labels = batch.target_positions(backbone.end_id, with_end=teach_end)
    longest = int(at.sum(1).max())
    if longest > most:
        raise DataError(
            f"an answer takes {longest} tokens with its end; serac keeps {most}",
            f"--set answer_tokens={longest}",
        )
    states, used = first_valid(*span(prefix.hidden, at), most)
    words, _ = first_valid(*span(labels[..., None], at), most)
    return Answers(
        states.float(),
        words[..., 0],
        used,
    )


def answered(
    networks: SeracNetworks,
    backbone: VisionLanguageModel,
    states: Tensor,
    answers: Answers,
) -> Tensor:
    """Return the states with which the counterfactual model answers, each row from its own edit: (R, T, D)."""
    head = backbone.anchors.module("head").weight
    assert isinstance(head, Tensor)
    words = head[answers.words.to(head.device)].to(states.device)
    found: Tensor = networks.counterfactual(
        states,
        answers.states,
        words,
        answers.used,
    )
    return found


class Memory(EditRows):
    """The edits in order: each tensor has a row an edit."""

    def __init__(self, width: int, code_width: int, most: int) -> None:
        shapes = {
            "code": (code_width,),
            "states": (most, width),
            "words": (most,),
            "used": (most,),
        }
        super().__init__(shapes)

    @property
    def answers(self) -> Answers:
        """What the counterfactual model reads."""
        found = self.tensors
        return Answers(
            found["states"],
            found["words"],
            found["used"],
        )

    def about(self, scope: Scope, queries: Tensor, threshold: float) -> Tensor:
        """Return which edit each query is about, -1 for none: codes (B, C) -> (B,).

        An edit that repeats the picture and the prompt of an earlier one hides it.
        """
        return about(
            scope,
            queries,
            self.tensors["code"],
            self.hidden,
            threshold,
        )
