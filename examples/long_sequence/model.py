"""A small encoder that finds hidden bases. Nothing in it knows of processes: attention alone looks beyond a token, and
that is sharded from outside, by `sequence_parallel`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.long_sequence.genome import BASES, MASKED
from torch_sinkhorn_attn import SinkhornMultiheadAttention


class Encoder(nn.Module):
    """Tokens `[N, L]` at positions `[L]` to logits of the four bases `[N, L, 4]`."""

    rates: Tensor

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 2, window: int = 128):
        super().__init__()
        self.embed = nn.Embedding(MASKED + 1, width)
        self.layers = nn.ModuleList(_Layer(width, heads, window) for _ in range(layers))
        self.read = nn.Linear(width, len(BASES))
        self.register_buffer("rates", 2.0 ** -torch.arange(width // 2))

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        angle = position[:, None] * self.rates
        x = self.embed(tokens) + torch.cat([angle.sin(), angle.cos()], -1)
        for layer in self.layers:
            x = layer(x)
        return self.read(x)


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = SinkhornMultiheadAttention(
            width, heads, batch_first=True, window=(window, window), base_iters=8, acceleration="chebyshev"
        )
        self.mix = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mix(self.norms[1](x))
