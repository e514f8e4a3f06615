"""The k largest entries of each line of a plan: what matches are made of, dense or from tiles.

Entries fall, ties go to the lowest index, and NaN comes before any number, so that it shows. An entry of 0 is nobody's
partner: where fewer than k are left the index is -1 and the mass 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32  # of a line whose largest entry is looked for again: torch finds maxima 20 times faster than where they are
SORTED_FROM = 32  # more partners than this are cheaper to find by sorting whole lines


class Best(NamedTuple):
    """The largest entries of each line: masses `[..., n, k]` and where they stand, int64 `[..., n, k]`."""

    mass: Tensor
    place: Tensor


def nobody(like: Tensor, *shape: int) -> Best:
    """Masses 0 and indices -1 of that shape."""
    return Best(like.new_zeros(shape), torch.full(shape, -1, dtype=torch.int64, device=like.device))


def leading(plan: Tensor, k: int, dim: int = -1) -> Best:
    """The k largest entries of each row of `plan [..., n, m]`, all of 0 or more; of each column for `dim=-2`.

    >>> leading(torch.tensor([[0.2, 0.5, 0.5], [0.0, 0.0, 0.1]]), 2)
    Best(mass=tensor([[0.5000, 0.5000],
            [0.1000, 0.0000]]), place=tensor([[ 1,  2],
            [ 2, -1]]))
    """
    size, lines = plan.shape[dim], plan.shape[-3 - dim]
    take = min(k, size)
    if take == 0 or plan.numel() == 0:
        return nobody(plan, *plan.shape[:-2], lines, k)
    mass, index = _sorted(plan, take, dim) if take > SORTED_FROM else _scanned(plan, take, dim)
    index = torch.where(mass == 0, -1, index)
    if take < k:
        mass, index = F.pad(mass, (0, k - take)), F.pad(index, (0, k - take), value=-1)
    return Best(mass, index)


def _sorted(plan: Tensor, k: int, dim: int) -> tuple[Tensor, Tensor]:
    mass, index = plan.transpose(dim, -1).sort(dim=-1, descending=True, stable=True)
    return mass[..., :k], index[..., :k]


def _scanned(plan: Tensor, k: int, dim: int) -> tuple[Tensor, Tensor]:
    """By chunks: the largest of each first, then the chunk that has the largest of all, then where in it that is."""
    width = min(CHUNK, plan.shape[dim])
    missing = -plan.shape[dim] % width
    if missing:
        plan = F.pad(plan, (0, missing) if dim == -1 else (0, 0, 0, missing))
    elif k > 1:
        plan = plan.clone()  # what has been found is taken out
    tops = plan.unflatten(dim, (-1, width)).amax(dim).transpose(dim, -1)
    plan = plan.transpose(dim, -1)
    chunks = plan.unflatten(-1, (-1, width))
    masses, indices = [], []
    for found in range(1, k + 1):
        chunk = tops.max(-1).indices[..., None]
        line = chunks.gather(-2, chunk[..., None].expand(*chunk.shape, width)).squeeze(-2)
        mass, place = line.max(-1, keepdim=True)
        masses.append(mass)
        indices.append(chunk * width + place)
        if found < k:
            plan.scatter_(-1, indices[-1], 0.0)
            tops = tops.scatter(-1, chunk, line.scatter(-1, place, 0.0).amax(-1, keepdim=True))
    return torch.cat(masses, -1), torch.cat(indices, -1)


def merged(first: Best, second: Best) -> Best:
    """The k largest of two lists of k for each line, all indices of the first being lower."""
    if first.mass.shape[-1] == 1:
        more = (second.mass > first.mass) | (second.mass.isnan() & ~first.mass.isnan())
        return Best(torch.where(more, second.mass, first.mass), torch.where(more, second.place, first.place))
    mass, index = (torch.cat(pair, -1) for pair in zip(first, second, strict=True))
    found = leading(mass, first.mass.shape[-1])
    return Best(found.mass, torch.where(found.place < 0, -1, index.gather(-1, found.place.clamp(min=0))))
