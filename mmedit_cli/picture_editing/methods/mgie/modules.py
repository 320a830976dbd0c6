"""What MGIE adds to a language model and a denoiser: eight visual tokens, and the head that reads their states."""

from __future__ import annotations

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
        self.embed = nn.Parameter(torch.zeros(N_TOKENS, d_llm))
        self.unembed = nn.Parameter(torch.zeros(N_TOKENS, d_llm))

    @torch.no_grad()
    def start_from(
        self, embed: Tensor, unembed: Tensor, generator: torch.Generator
    ) -> None:
        """Start as the mean row of both matrices (V, D), each with its own noise of a row's spread."""
        for own, rows in ((self.embed, embed), (self.unembed, unembed)):
            rows = rows.float()
            noise = torch.randn(own.shape, generator=generator).to(own.device)
            own.copy_(rows.mean(0) + noise * rows.std(0))


class MGIEEditHead(ModelMixin, ConfigMixin):
    """From the states of the visual tokens to what stands in the place of a text encoding (Fu et al. 2024).

    A transformer without masks and without positions: encoder over the 8 sums of state and embedding, decoder over
    `n_queries` learned queries. Names and shapes of the parameters are those of the published weights, but for the
    visual tokens, which lie here too.
    """

    @register_to_config
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
        shape = {"dropout": 0.0, "batch_first": True, "norm_first": True}
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
        hidden = self.llm2hid(
            (states + self.tokens.embed).to(self.llm2hid.weight.dtype)
        )
        return self.hid2feat(
            self.mapper(hidden, self.query.expand(len(hidden), -1, -1))
        )  # type: ignore[no-any-return]

    def null(self, n: int) -> Tensor:
        """Return the condition of nothing, (n, n_queries, d_context): that of states that are 0."""
        return self(torch.zeros_like(self.tokens.embed)[None]).expand(n, -1, -1)  # type: ignore[no-any-return]


def widened(convolution: nn.Conv2d, channels: int) -> nn.Conv2d:
    """Return a convolution with more input channels that gives what the old one gave, whatever the new ones hold.

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
