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
        x = maps.detach() * active
        if x.device.type == "xla":
            return by_blocks(F.gelu(by_blocks(x, self.gather)) * active, self.decide)
        # Channels last is about twice as fast on CPU with so few channels.
        x = x.contiguous(memory_format=torch.channels_last)
        return self.decide(F.gelu(self.gather(x)) * active).contiguous()


def by_blocks(x: Tensor, convolution: nn.Conv2d, block: int = 128) -> Tensor:
    """The convolution of [N, C, L, S], centred and padded with zeros, as one matrix product.

    A TPU's compiler unrolls a convolution of few channels into hundreds of thousands of instructions. A block of a row
    and what its kernel reaches, of all channels and rows of the kernel, times a banded matrix suits its matrix unit.
    """
    weight, length, size = convolution.weight, x.shape[2], x.shape[3]
    height, width = weight.shape[2:]
    blocks = -(-size // block)
    edge = width // 2 + blocks * block - size
    x = F.pad(x, (width // 2, edge, height // 2, height // 2))
    x = torch.stack([x[:, :, row : row + length] for row in range(height)], dim=2)
    reach = block + width - 1
    x = torch.stack([x[..., at : at + reach] for at in range(0, blocks * block, block)], dim=-2)
    inside, offset = torch.arange(block, device=x.device), torch.arange(width, device=x.device)
    taken = torch.arange(reach, device=x.device)[:, None, None] == inside[:, None] + offset
    band = torch.einsum("ochw,ksw->chkos", weight, taken.to(weight.dtype))
    found = torch.einsum("nchlbk,chkos->nolbs", x, band).flatten(3)[..., :size]
    return found if convolution.bias is None else found + convolution.bias[:, None, None]
