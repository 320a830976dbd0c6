"""The networks of UniKE: two contrastive encoders a layer, what they were made from, and the scope of an edit.

B sequences, T tokens, D width of the model, S edited layers, N rows of knowledge, K of them retrieved, F features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmedit_cli.knowledge.methods.shared.attention import Extractor
from mmedit_cli.knowledge.methods.unike.hparams import UnikeHparams

_VECTORS = 4  # that a feature of the scope consists of
_RIDGE = 1e-3  # of the least squares that read a truthfulness encoding back, relative to its mean square


def encoder(width: int, hidden: int, out: int) -> nn.Module:
    """Return a perceptron with one hidden layer: (..., D) -> (..., out)."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))


class Scope(nn.Module):
    """Reads what a sequence is about, to tell which edit it belongs to, if any (ours: the paper has no such test)."""

    def __init__(self, width: int, dim: int, heads: int) -> None:
        super().__init__()
        self.features = _VECTORS * dim
        self.extractor = Extractor(width, dim, heads, _VECTORS)
        self.sharpness = nn.Parameter(
            torch.full((2,), 10.0).log()
        )  # of picture and question
        self.bias = nn.Parameter(torch.tensor(10.0))

    def forward(
        self, hidden: Tensor, prompt_mask: Tensor, image_mask: Tensor
    ) -> Tensor:
        """Return unit features of picture and question side by side, (B, 2 F); without a picture its part is 0."""
        hidden, seeing = hidden.float(), image_mask.any(1)
        out = hidden.new_zeros(len(hidden), 2, self.features)
        for rows, with_picture in (
            (seeing.nonzero()[:, 0], True),
            ((~seeing).nonzero()[:, 0], False),
        ):
            if len(rows):
                image = image_mask[rows] if with_picture else prompt_mask[rows]
                picture, question, _ = self.extractor(
                    hidden[rows], prompt_mask[rows], image
                )
                both = torch.stack(
                    (F.normalize(picture) * with_picture, F.normalize(question)), 1
                )
                out = out.index_copy(0, rows, both)
        return out.flatten(1)

    def score(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return how surely a query is about an edit: (R, 2 F), (N, 2 F) -> (R, N); above 0 it rather is than not.

        Where just one of the two has a picture it is not: -inf.
        """
        (picture, question), (of_picture, of_question) = (
            queries.chunk(2, 1),
            keys.chunk(2, 1),
        )
        for_picture, for_question = self.sharpness.exp()
        sees, seen = picture.any(1)[:, None], of_picture.any(1)[None]
        likeness = torch.where(sees | seen, picture @ of_picture.T, 1.0)
        score = (
            for_picture * likeness
            + for_question * (question @ of_question.T)
            - self.bias
        )
        return score.masked_fill(sees != seen, float("-inf"))


class UnikeNetworks(nn.Module):
    """Everything of UniKE that belongs to a model and not to an edit.

    Buffers: sem (N, D), states of questions on entering the first edited layer; pos (S, N, D), what the attention of
    each layer says at the end of the right answer; rows, how many of the N are there; zeta (S, d_t), the direction of
    truthfulness among the encodings, and shift (S, D), the same among the states.
    """

    sem: Tensor
    pos: Tensor
    rows: Tensor
    shift: Tensor
    zeta: Tensor

    def __init__(self, width: int, hparams: UnikeHparams) -> None:
        super().__init__()
        hp, layers = hparams, hparams.layers
        self.semantic = nn.ModuleList(
            encoder(width, hp.encoder_dim, width) for _ in range(layers)
        )
        self.truth = nn.ModuleList(
            encoder(width, hp.encoder_dim, hp.truth_dim) for _ in range(layers)
        )
        self.scope = Scope(width, hp.scope_dim, hp.heads)
        self.register_buffer(
            "sem", torch.zeros(hp.knowledge, width, dtype=torch.float16)
        )
        self.register_buffer(
            "pos", torch.zeros(layers, hp.knowledge, width, dtype=torch.float16)
        )
        self.register_buffer("rows", torch.zeros((), dtype=torch.long))
        self.register_buffer("zeta", torch.zeros(layers, hp.truth_dim))
        self.register_buffer("shift", torch.zeros(layers, width))

    def know(self, sem: Tensor, pos: Tensor) -> None:
        """Take (N', D) and (S, N', D) as the knowledge; of more rows than there is room for, evenly many are taken."""
        room = len(self.sem)
        kept = (
            torch.linspace(0, len(sem) - 1, min(room, len(sem)), device=sem.device)
            .round()
            .long()
        )
        self.sem[: len(kept)], self.pos[:, : len(kept)] = (
            sem[kept].half(),
            pos[:, kept].half(),
        )
        self.rows.fill_(len(kept))

    @torch.no_grad()
    def finalize(self, pos: Tensor, neg: Tensor) -> None:
        """Fix the direction of truthfulness from states of right and wrong answers, (S, N', D) each (section 3.3).

        It is the difference of the mean encodings, read back by the linear map that best restores the states.
        """
        for s, encode in enumerate(self.truth):
            right, wrong = encode(pos[s]), encode(neg[s])
            self.zeta[s] = right.mean(0) - wrong.mean(0)
            codes, states = torch.cat((right, wrong)), torch.cat((pos[s], neg[s]))
            gram = codes.T @ codes
            gram = gram + _RIDGE * gram.diagonal().mean() * torch.eye(
                len(gram), device=gram.device
            )
            self.shift[s] = self.zeta[s] @ torch.linalg.solve(gram, codes.T @ states)


def truth_loss(right: Tensor, wrong: Tensor, temperature: float) -> Tensor:
    """Return eq. 4: states of one truth value belong together, whatever they mean. (n, d_t) each; no self-pairs."""
    codes = F.normalize(torch.cat((right, wrong)))
    similar = (codes @ codes.T / temperature).fill_diagonal_(float("-inf"))
    same = torch.arange(len(codes), device=codes.device) < len(right)
    matched = similar.masked_fill(same[:, None] != same[None], float("-inf"))
    return (similar.logsumexp(1) - matched.logsumexp(1)).mean()


def semantic_loss(
    sem: Tensor, right: Tensor, wrong: Tensor, temperature: float
) -> Tensor:
    """Return eq. 5: both answers to a question belong to it, whatever their truth. (n, D) each; cosines."""
    anchors = F.normalize(sem)
    both = (
        torch.cat([anchors @ F.normalize(codes).T for codes in (right, wrong)], 1)
        / temperature
    )
    own = torch.stack([both.diagonal(), both.diagonal(len(sem))], 1)
    return (both.logsumexp(1) - own.logsumexp(1)).mean()


def attend(states: Tensor, rows: Tensor, sharpness: float | None) -> Tensor:
    """Return eq. 8: each state as a mixture of rows, which are keys and values. (R, T, D), (R, K, D) -> (R, T, D).

    The logits are cosines times `sharpness`; None: raw inner products, as published.
    """
    if sharpness is None:
        logits = states @ rows.transpose(-1, -2)
    else:
        logits = (
            sharpness
            * F.normalize(states, dim=-1)
            @ F.normalize(rows, dim=-1).transpose(-1, -2)
        )
    return logits.softmax(-1) @ rows


def blend(said: Tensor, known: Tensor, share: Tensor) -> Tensor:
    """Return what attention says, turned towards what is known, and as long as it was.

    said, known, result: (R, T, D); share: (R, T), 0 changes no bit. The published code leaves a vector of length 1,
    which all but wipes the branch out.
    """
    turned = F.normalize(known, dim=-1) * said.norm(dim=-1, keepdim=True)
    return said + share[..., None] * (turned - said)
