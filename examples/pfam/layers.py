"""The pieces of the aligner that are not attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ContextBlock(nn.Module):
    """Residual block over a sequence: depthwise convolution, then a two-layer perceptron.

    Input and output [N, L, d]; ``active`` [N, L, 1] is 0 on padding, which stays exactly zero.
    """

    def __init__(self, dim: int, dilation: int, dropout: float, width: int = 5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mix = nn.Conv1d(dim, dim, width, padding=dilation * (width // 2), dilation=dilation, groups=dim)
        self.perceptron = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        y = self.mix((self.norm(x) * active).transpose(1, 2)).transpose(1, 2)
        return (x + self.perceptron(y)) * active


class Harmonics(nn.Module):
    """Positions as features whose inner product is a learned even function of the distance.

    <f(x), f(y)> = sum_w a_w cos(2 pi (x - y) / w) with learned a_w >= 0, over fixed wavelengths w: rotary embeddings'
    kernel, kept apart from the content so that it stays a mild preference with no hard range.

    Args:
        wavelengths: w, in the unit of the positions.
        amplitude: initial a_w.
    """

    wavelengths: Tensor

    def __init__(self, wavelengths: tuple[float, ...], amplitude: float) -> None:
        super().__init__()
        self.register_buffer("wavelengths", torch.tensor(wavelengths), persistent=False)
        start = torch.full((len(wavelengths),), amplitude)
        self.raw_amplitude = nn.Parameter(torch.log(torch.expm1(start)))

    def forward(self, positions: Tensor) -> Tensor:
        """[N, L] positions to [N, L, 2 * len(wavelengths)] features."""
        phase = 2 * torch.pi * positions[..., None] / self.wavelengths
        weight = F.softplus(self.raw_amplitude).sqrt()
        return torch.cat([phase.cos() * weight, phase.sin() * weight], dim=-1)


class DiagonalEvidence(nn.Module):
    """A small image network over [N, L, S] maps: what supports pair (i, j) along its diagonal.

    Two sequences align in gapless runs, so the neighbours (i+k, j+k) of a true pair are likely pairs too. Convolutions
    on the first plan see them directly and know nothing of any family: this is what carries over to unseen ones.

    The maps are read, not trained through: what made them has a loss of its own, and the backward costs half.
    """

    def __init__(self, maps: int, channels: int = 8, width: int = 9) -> None:
        super().__init__()
        self.gather = nn.Conv2d(maps, channels, width, padding=width // 2)
        self.decide = nn.Conv2d(channels, 1, 5, padding=2)

    def forward(self, maps: Tensor, active: Tensor) -> Tensor:
        """Maps [N, C, L, S] and active [N, 1, L, S] (0 on padding) to score corrections [N, 1, L, S]."""
        # Channels last is about twice as fast on CPU with so few channels.
        x = (maps.detach() * active).contiguous(memory_format=torch.channels_last)
        return self.decide(F.gelu(self.gather(x)) * active).contiguous()
