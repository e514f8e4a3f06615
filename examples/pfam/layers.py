"""The pieces of the aligner that are not attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .evidence_kernels import depthwise, perceptron
from .kernels import diagonal_averages


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
        y = self.norm(x) * active
        if compiled(x) and not torch.is_grad_enabled():  # a convolution of one channel each is slow there
            assert self.mix.bias is not None
            y = depthwise(y, self.mix.weight[:, 0], self.mix.bias, self.mix.dilation[0])
        else:
            y = self.mix(y.transpose(1, 2)).transpose(1, 2)
        return (x + self.perceptron(y)) * active


def diagonal_means(maps: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Averages along the diagonals of [N, C, L, S] maps, twice over each odd width: [N, len(widths) C, L, S].

    Two sequences align in gapless runs, so what supports (i, j) stands at (i + k, j + k). A moving average taken twice
    weighs its neighbours by a triangle, close to a Gaussian of standard deviation width / sqrt(6); beyond the ends of a
    diagonal stand zeros.
    """
    if maps.shape[2] > 2 * maps.shape[3]:  # time and memory are L (L + S)
        return _DiagonalMeans.apply(maps.mT, widths).mT
    return _DiagonalMeans.apply(maps, widths)


class _DiagonalMeans(torch.autograd.Function):
    """An average with zeros beyond the ends is its own adjoint, so the backward is the forward: a third of the time
    that autograd takes through the running sums."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, widths: tuple[int, ...]) -> Tensor:
        ctx.widths = widths
        if compiled(maps):
            return diagonal_averages(maps, widths)
        columns = _diagonals(maps)
        return torch.cat([_from_diagonals(_twice(columns, width), maps.shape[3]) for width in widths], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if compiled(grad):
            of_widths = zip(grad.chunk(len(ctx.widths), dim=1), ctx.widths, strict=True)
            return torch.stack([diagonal_averages(part, (width,)) for part, width in of_widths]).sum(dim=0), None
        parts = _diagonals(grad).chunk(len(ctx.widths), dim=1)
        total = torch.stack([_twice(part, width) for part, width in zip(parts, ctx.widths, strict=True)]).sum(dim=0)
        return _from_diagonals(total, grad.shape[3]), None


def _diagonals(maps: Tensor) -> Tensor:
    """[N, C, L, S] to [N, C, L, S + L + 1]: entry (i, j) in column j - i + L, zeros elsewhere."""
    length, size = maps.shape[2:]
    flat = F.pad(F.pad(maps, (length, 0)).flatten(2), (0, length))
    return flat.unflatten(2, (length, size + length + 1))


def _from_diagonals(columns: Tensor, size: int) -> Tensor:
    """The inverse of ``_diagonals``."""
    length = columns.shape[2]
    return columns.flatten(2)[..., :-length].unflatten(2, (length, size + length))[..., length:]


def _twice(columns: Tensor, width: int) -> Tensor:
    """The moving average down the columns, twice. The first runs beyond both ends, where the second still reads it:
    so padding changes nothing, and the two sequences are treated alike."""
    if _has_matrix_unit(columns):
        row = torch.arange(columns.shape[2], device=columns.device)
        triangle = (width - (row[:, None] - row).abs()).clamp(min=0).to(columns.dtype)
        return torch.einsum("kl,nclw->nckw", triangle / width**2, columns)
    reach = width - 1
    return _sums(_sums(F.pad(columns / width**2, (0, 0, reach, reach)), width), width)


def compiled(x: Tensor) -> bool:
    """Whether ``kernels`` can run: on CPUs, which have a loop where other devices have tensors."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def _has_matrix_unit(columns: Tensor) -> bool:
    """Whether to multiply with the averages' matrix: on TPUs a running sum takes a time that grows with the
    length for every entry."""
    return columns.device.type in ("xla", "tpu")


def _sums(columns: Tensor, width: int) -> Tensor:
    """Sums of ``width`` neighbours down the columns: width - 1 rows fewer."""
    total = F.pad(columns, (0, 0, 1, 0)).cumsum(dim=2)
    return total[:, :, width:] - total[:, :, :-width]


class PairScore(nn.Module):
    """A score for every pair of residues from what is known of it: a linear function plus a small perceptron.

    Every entry is judged by itself, with the same few weights whatever the family: that is what carries over to
    families never seen. The perceptron starts at zero.

    Args:
        maps: C, how many numbers describe a pair.
        hidden: width of the perceptron.
        linear: initial weights of the linear function, C or fewer; the rest start at zero.
    """

    def __init__(self, maps: int, hidden: int, linear: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.linear = nn.Parameter(torch.tensor([*linear, *[0.0] * (maps - len(linear))]))
        self.hidden = nn.Linear(maps, hidden)
        self.score = nn.Parameter(torch.zeros(hidden))

    def forward(self, *groups: Tensor) -> Tensor:
        """Maps [N, C1, L, S], [N, C2, L, S], ... with C1 + C2 + ... = C, never copied together, to [N, L, S]."""
        if compiled(groups[0]) and not torch.is_grad_enabled():
            known = (self.linear, self.hidden.weight, self.hidden.bias, self.score)
            flats = zip(*(group.flatten(2) for group in groups), strict=True)
            return torch.stack([perceptron(flat, *known) for flat in flats]).unflatten(1, groups[0].shape[2:])
        hidden, linear = self.hidden.bias[:, None], torch.zeros((), device=self.linear.device)
        sizes = [group.shape[1] for group in groups]
        weights = zip(groups, self.hidden.weight.split(sizes, dim=1), self.linear.split(sizes), strict=True)
        for group, of_hidden, of_linear in weights:
            flat = group.flatten(2)
            hidden = torch.baddbmm(hidden, of_hidden.expand(len(flat), -1, -1), flat)
            linear = linear + of_linear @ flat
        return (linear + self.score @ hidden.relu()).unflatten(1, groups[0].shape[2:])
