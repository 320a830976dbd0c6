"""What MGIE adds to a language model and a denoiser: eight visual tokens, and the head that reads their states."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

N_TOKENS = 8  # [IMG0] ... [IMG7]


class VisualTokens(nn.Module):
    """The rows that [IMG0] ... [IMG7] add to the vocabulary: (8, D) on the way in, (8, D) on the way out.

    They stand beside the language model's own matrices, which stay as they are; their ids follow its last one.
    """

    def __init__(self, d_llm: int) -> None:
        super().__init__()
        zeros = torch.zeros(N_TOKENS, d_llm)
        self.embed = nn.Parameter(zeros.clone())
        self.unembed = nn.Parameter(zeros)

    @torch.no_grad()
    def start_from(
        self, embed: Tensor, unembed: Tensor, generator: torch.Generator
    ) -> None:
        """Start as the mean row of both matrices (V, D), each with its own noise of a row's spread."""
        _start_rows(self.embed, embed, generator)
        _start_rows(self.unembed, unembed, generator)


def _start_rows(own: nn.Parameter, rows: Tensor, generator: torch.Generator) -> None:
    rows = rows.float()
    mean = rows.mean(0)
    spread = rows.std(0)
    noise = torch.randn(own.shape, generator=generator).to(own.device)
    own.copy_(mean + noise * spread)


class MGIEEditHead(ModelMixin, ConfigMixin):
    """Turns the states of the visual tokens into the condition of the denoiser, a text encoding (Fu et al. 2024).

    A transformer without masks and without positions: the encoder reads the 8 sums of state and embedding, the decoder
    has `n_queries` learned queries. Names and shapes of the parameters are those of the published weights, except for
    the visual tokens, which are part of this module.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        d_llm: int = 4096,
        d_model: int = 512,
        n_queries: int = 77,
        d_context: int = 768,
        layers: int = 4,
        heads: int = 4,
        d_feedforward: int = 2048,
    ) -> None:
        super().__init__()
        shape: dict[str, Any] = {
            "dropout": 0.0,
            "batch_first": True,
            "norm_first": True,
        }
        encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(d_model, heads, d_feedforward, **shape),
            layers,
            nn.LayerNorm(d_model),
            enable_nested_tensor=False,
        )
        self.tokens = VisualTokens(d_llm)
        self.llm2hid = nn.Linear(d_llm, d_model)
        self.query = nn.Parameter(torch.randn(1, n_queries, d_model))
        self.mapper = nn.Transformer(
            d_model,
            heads,
            custom_encoder=encoder,
            num_decoder_layers=layers,
            dim_feedforward=d_feedforward,
            **shape,
        )
        self.hid2feat = nn.Linear(d_model, d_context)

    def forward(self, states: Tensor) -> Tensor:
        """Return the condition (B, n_queries, d_context) for the states (B, 8, D) of the visual tokens."""
        summed = states + self.tokens.embed
        dtype = self.llm2hid.weight.dtype
        hidden = self.llm2hid(summed.to(dtype))
        batch = len(hidden)
        queries = self.query.expand(batch, -1, -1)
        decoded = self.mapper(hidden, queries)
        features: Tensor = self.hid2feat(decoded)
        return features

    def null(self, n: int) -> Tensor:
        """Return the condition of no instruction, (n, n_queries, d_context): that of states that are 0."""
        zeros = torch.zeros_like(self.tokens.embed)
        condition: Tensor = self(zeros[None])
        return condition.expand(n, -1, -1)


def widened(convolution: nn.Conv2d, channels: int) -> nn.Conv2d:
    """Return a convolution with more input channels; whatever they hold, its output is that of the old one.

    Weight and bias are copied, the rest is 0 (the published training code leaves the bias random).
    """
    wide = nn.Conv2d(
        channels,
        convolution.out_channels,
        convolution.kernel_size,  # type: ignore[arg-type]
        convolution.stride,  # type: ignore[arg-type]
        convolution.padding,  # type: ignore[arg-type]
    ).to(convolution.weight.device, convolution.weight.dtype)
    with torch.no_grad():
        wide.weight.zero_()
        wide.weight[:, : convolution.in_channels] = convolution.weight
        assert wide.bias is not None
        assert convolution.bias is not None
        wide.bias.copy_(convolution.bias)
    return wide
