"""The networks of RECIPE: what a question and an edit are compared by, and what an edit becomes (Chen et al. 2024).

R queries, N edits, S tokens of an answer, P soft tokens, E width of what enters the model, D width of its layers, H
width of a representation, K values of a key.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmedit_cli.knowledge.methods.recipe.hparams import RecipeHparams
from mmedit_cli.knowledge.methods.shared.question_features import QuestionFeatures

_APART = -1e4  # score of a question and an edit of which one alone has a picture
_START = 0.05  # of the prototype, uniform, as published


class Residual(nn.Module):
    """x + relu(W x), as published."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, values: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        read = self.linear(values)
        result: Tensor = values + read.relu()
        return result


class Head(nn.Module):
    """Turns a representation into what is compared."""

    def __init__(self, width: int, key_dim: int) -> None:
        super().__init__()
        self.residual = Residual(width)
        self.linear = nn.Linear(width, key_dim)

    def forward(self, values: Tensor) -> Tensor:
        """(..., H) -> (..., K)."""
        read = self.residual(values)
        found: Tensor = self.linear(read)
        return found


class RecipeNetworks(nn.Module):
    """What reads questions and edits, the prototype that is the threshold, and what makes soft tokens of an edit.

    The published encoder is RoBERTa on "prompt target"; this one reads what enters the frozen model, and the picture.
    A question is read without any answer, an edit with its own.
    """

    def __init__(self, width: int, entry_width: int, hparams: RecipeHparams) -> None:
        super().__init__()
        hp = hparams
        self.soft_tokens = hp.soft_tokens
        self.words = nn.LayerNorm(entry_width)
        self.pictures = nn.LayerNorm(entry_width)
        self.asked = nn.Linear(2 * entry_width, hp.hidden_dim)
        self.answered = nn.Linear(entry_width, hp.hidden_dim, bias=False)
        # tells the first word of an answer from the second
        self.order = nn.Parameter(torch.ones(hp.answer_tokens, entry_width))
        nn.init.normal_(self.order, mean=1.0, std=0.5)
        self.query = Head(hp.hidden_dim, hp.key_dim)
        self.key = Head(hp.hidden_dim, hp.key_dim)
        prototype = torch.empty(hp.prototype_tokens, entry_width)
        self.prototype_words = nn.Parameter(prototype.uniform_(-_START, _START))
        self.prototype_picture = nn.Parameter(torch.zeros(entry_width))
        self.transformer = Residual(hp.hidden_dim)
        self.writes = nn.Linear(hp.hidden_dim, hp.soft_tokens * width)
        self.copies = nn.Linear(entry_width, width, bias=False)

    # -- what is read -------------------------------------------------------------------------------------------

    def read(self, found: QuestionFeatures) -> Tensor:
        """Return the representations of questions: (R, H)."""
        return self._asked(found.words, found.pictures)

    def _asked(self, words: Tensor, pictures: Tensor) -> Tensor:
        words = self.words(words)
        pictures = self.pictures(pictures)
        both = torch.cat((words, pictures), -1)
        asked: Tensor = self.asked(both)
        return asked

    def read_edits(
        self, found: QuestionFeatures, answers: Tensor, used: Tensor
    ) -> Tensor:
        """Return the representations of edits, answers (N, S, E), used (N, S) bool -> (N, H)."""
        placed = answers.float() * self.order
        counted = used[..., None]
        total = (placed * counted).sum(1)
        count = counted.sum(1).clamp(min=1)
        mean = self.words(total / count)
        answered = self.answered(mean)
        known: Tensor = self.read(found) + answered
        return known

    # -- what is compared ---------------------------------------------------------------------------------------

    def threshold_key(self) -> Tensor:
        """Return the key of the prototype: (K,)."""
        words = self.prototype_words.mean(0)
        asked = self._asked(words, self.prototype_picture)
        read = self.words(words)
        answered = self.answered(read)
        key: Tensor = self.key(asked + answered)
        return key

    def scores(
        self, questions: QuestionFeatures, keys: Tensor, edits_see: Tensor
    ) -> Tensor:
        """Return the scores of questions for edits, and last for the prototype: keys (N, K), (N,) -> (R, N + 1)."""
        read = self.read(questions)
        queries = self.query(read)
        threshold = self.threshold_key()
        every = torch.cat((keys, threshold[None]))
        products = queries @ every.T
        sharpness = keys.shape[-1] ** -0.5
        sees = questions.sees[:, None]
        apart = sees != edits_see
        # the prototype answers for both kinds
        apart = F.pad(
            apart,
            (0, 1),
        )
        found: Tensor = sharpness * products
        return found.masked_fill(
            apart,
            _APART,
        )

    # -- what an edit becomes -----------------------------------------------------------------------------------

    def soft(self, known: Tensor, answers: Tensor, used: Tensor) -> Tensor:
        """Return the soft tokens of edits: (N, H), (N, S, E), (N, S) -> (N, P, D).

        The first words of the answer reach the soft tokens directly as well (ours).
        """
        rows = len(known)
        first = self.soft_tokens
        transformed = self.transformer(known)
        written = self.writes(transformed)
        soft = written.view(
            rows,
            first,
            -1,
        )
        heard = answers.float() * used[..., None]
        heard = heard[:, :first]
        missing = first - heard.shape[1]
        padded = F.pad(
            heard,
            (0, 0, 0, missing),
        )
        copied: Tensor = self.copies(padded)
        found: Tensor = soft + copied
        return found
