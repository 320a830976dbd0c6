"""The networks of UniKE: two contrastive encoders a layer, what they were made from, and the scope of an edit.

B sequences, T tokens, D width of the model, S edited layers, N rows of knowledge, K of them retrieved, F features.
Sections and equations are those of Pan et al., NeurIPS 2024.
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
        self.extractor = Extractor(
            width,
            dim,
            heads,
            _VECTORS,
        )
        sharpness = torch.full((2,), 10.0)  # of picture and question
        self.sharpness = nn.Parameter(sharpness.log())
        self.bias = nn.Parameter(torch.tensor(10.0))

    def forward(
        self, hidden: Tensor, prompt_mask: Tensor, image_mask: Tensor
    ) -> Tensor:
        """Return unit features of picture and question side by side, (B, 2 F); without a picture its part is 0."""
        hidden = hidden.float()
        seeing = image_mask.any(1)
        features = hidden.new_zeros(
            len(hidden),
            2,
            self.features,
        )
        for sees in (True, False):
            rows = (seeing == sees).nonzero()[:, 0]
            if not len(rows):
                continue
            prompt = prompt_mask[rows]
            # the extractor needs a token to look at: without a picture it is given the prompt
            image = image_mask[rows] if sees else prompt
            picture, question, _ = self.extractor(
                hidden[rows],
                prompt,
                image,
            )
            picture = F.normalize(picture) * sees
            question = F.normalize(question)
            both = torch.stack((picture, question), 1)
            features = features.index_copy(0, rows, both)
        return features.flatten(1)

    def score(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return how surely a query is about an edit: (R, 2 F), (N, 2 F) -> (R, N).

        A score above 0 says that it is. If only one of the two has a picture, the score is -inf.
        """
        picture, question = queries.chunk(2, 1)
        edited_picture, edited_question = keys.chunk(2, 1)
        picture_sharpness, question_sharpness = self.sharpness.exp()
        query_sees = picture.any(1)[:, None]
        edit_sees = edited_picture.any(1)[None]
        # two questions without pictures count as alike in their pictures
        picture_likeness = torch.where(
            query_sees | edit_sees,
            picture @ edited_picture.T,
            1.0,
        )
        question_likeness = question @ edited_question.T
        by_picture = picture_sharpness * picture_likeness
        by_question = question_sharpness * question_likeness
        score: Tensor = by_picture + by_question - self.bias
        return score.masked_fill(query_sees != edit_sees, float("-inf"))


class MemoryNetworks(nn.Module):
    """The networks and the knowledge that are used when a question is answered."""

    semantic: nn.ModuleList
    scope: Scope
    sem: Tensor
    pos: Tensor
    rows: Tensor


class UnikeNetworks(MemoryNetworks):
    """Everything of UniKE that belongs to a model and not to an edit.

    Buffers: sem (N, D), states of questions on entering the first edited layer; pos (S, N, D), the output of the
    attention of each layer at the end of the right answer; rows, how many of the N are filled; zeta (S, d_t), the
    direction of truthfulness among the encodings, and shift (S, D), the same among the states.
    """

    shift: Tensor
    zeta: Tensor

    def __init__(self, width: int, hparams: UnikeHparams) -> None:
        super().__init__()
        layers = hparams.layers
        assert isinstance(layers, int), "a share of the depth is resolved before"
        hidden = hparams.encoder_dim
        truth_dim = hparams.truth_dim
        semantic = [encoder(width, hidden, width) for _ in range(layers)]
        truth = [encoder(width, hidden, truth_dim) for _ in range(layers)]
        self.semantic = nn.ModuleList(semantic)
        self.truth = nn.ModuleList(truth)
        self.scope = Scope(
            width,
            hparams.scope_dim,
            hparams.heads,
        )
        room = hparams.knowledge
        sem = torch.zeros(
            room,
            width,
            dtype=torch.float16,
        )
        pos = torch.zeros(
            layers,
            room,
            width,
            dtype=torch.float16,
        )
        rows = torch.zeros((), dtype=torch.long)
        self.register_buffer("sem", sem)
        self.register_buffer("pos", pos)
        self.register_buffer("rows", rows)
        self.register_buffer("zeta", torch.zeros(layers, truth_dim))
        self.register_buffer("shift", torch.zeros(layers, width))

    def know(self, sem: Tensor, pos: Tensor) -> None:
        """Take (N', D) and (S, N', D) as the knowledge; of more rows than there is room for, evenly many are taken."""
        room = len(self.sem)
        count = min(room, len(sem))
        spread = torch.linspace(
            start=0,
            end=len(sem) - 1,
            steps=count,
            device=sem.device,
        )
        chosen = spread.round().long()
        chosen_sem = sem[chosen]
        chosen_pos = pos[:, chosen]
        self.sem[:count] = chosen_sem.half()
        self.pos[:, :count] = chosen_pos.half()
        self.rows.fill_(count)

    @torch.no_grad()
    def finalize(self, pos: Tensor, neg: Tensor) -> None:
        """Fix the direction of truthfulness from states of right and wrong answers, (S, N', D) each (section 3.3).

        It is the difference of the mean encodings, read back by the linear map that best restores the states.
        """
        for layer, encode in enumerate(self.truth):
            true_states = pos[layer]
            false_states = neg[layer]
            right = encode(true_states)
            wrong = encode(false_states)
            direction = right.mean(0) - wrong.mean(0)
            codes = torch.cat((right, wrong))
            states = torch.cat((true_states, false_states))
            decoder = _decoder(codes, states)
            self.zeta[layer] = direction
            self.shift[layer] = direction @ decoder


def _decoder(codes: Tensor, states: Tensor) -> Tensor:
    """Return the map from codes back to states by ridge regression: (n, d_t), (n, D) -> (d_t, D)."""
    gram = codes.T @ codes
    unit = torch.eye(len(gram), device=gram.device)
    mean_square = gram.diagonal().mean()
    ridge = _RIDGE * mean_square
    regular = gram + ridge * unit
    moments = codes.T @ states
    decoder: Tensor = torch.linalg.solve(regular, moments)
    return decoder


def truth_loss(right: Tensor, wrong: Tensor, temperature: float) -> Tensor:
    """Return eq. 4: states of one truth value belong together, whatever they mean. (n, d_t) each; no self-pairs."""
    never = float("-inf")
    both = torch.cat((right, wrong))
    codes = F.normalize(both)
    similarity = codes @ codes.T / temperature
    similarity = similarity.fill_diagonal_(never)
    number = torch.arange(len(codes), device=codes.device)
    is_right = number < len(right)
    differs = is_right[:, None] != is_right[None]
    matched = similarity.masked_fill(differs, never)
    all_pairs = similarity.logsumexp(1)
    matched_pairs = matched.logsumexp(1)
    return (all_pairs - matched_pairs).mean()


def semantic_loss(
    sem: Tensor, right: Tensor, wrong: Tensor, temperature: float
) -> Tensor:
    """Return eq. 5: both answers to a question belong to it, whatever their truth. (n, D) each; cosines."""
    anchors = F.normalize(sem)
    right = F.normalize(right)
    wrong = F.normalize(wrong)
    with_right = anchors @ right.T
    with_wrong = anchors @ wrong.T
    cosines = torch.cat([with_right, with_wrong], 1)
    similarity = cosines / temperature
    own_right = similarity.diagonal()
    own_wrong = similarity.diagonal(len(sem))
    own = torch.stack([own_right, own_wrong], 1)
    all_pairs = similarity.logsumexp(1)
    own_pairs = own.logsumexp(1)
    return (all_pairs - own_pairs).mean()


def attend(states: Tensor, rows: Tensor, sharpness: float | None) -> Tensor:
    """Return eq. 8: each state as a mixture of rows, which are keys and values. (R, T, D), (R, K, D) -> (R, T, D).

    The logits are cosines times `sharpness`; None: raw inner products, as published.
    """
    queries = states
    keys = rows
    if sharpness is not None:
        queries = sharpness * F.normalize(states, dim=-1)
        keys = F.normalize(rows, dim=-1)
    logits = queries @ keys.transpose(-1, -2)
    weights: Tensor = logits.softmax(-1)
    return weights @ rows


def blend(output: Tensor, known: Tensor, share: Tensor) -> Tensor:
    """Return the output of attention, turned towards what is known, and as long as it was (eq. 9).

    output, known, result: (R, T, D); share: (R, T), 0 changes no bit. The published code leaves a vector of length 1,
    which all but wipes the branch out.
    """
    length = output.norm(dim=-1, keepdim=True)
    direction = F.normalize(known, dim=-1)
    turned = direction * length
    share = share[..., None]
    mixed: Tensor = output + share * (turned - output)
    return mixed
