"""Dropout numbers as a pure function of (seed, head, row, column), so that any tile of any engine sees the same ones.

Counter-based: 32-bit integer mixing (Murmur3's finaliser, A. Appleby, public domain) over the entry's coordinates. No
state, no stored mask: the backward draws the same numbers again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_sinkhorn_attn.problem.problem import Problem

_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """Murmur3's 32-bit finaliser, on int64 tensors that hold 32-bit values."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _MASK
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def keep_tile(seed: Tensor, heads: Tensor, rows: Tensor, cols: Tensor, dropout_p: float) -> Tensor:
    """Bool `[..., rows, cols]`: True keeps the entry, with probability 1 - dropout_p.

    Args:
        seed: `[2]` int64, 32 random bits each.
        heads: flat index n * H + h, any shape; rows, cols: 1-D indices.
    """
    stream = _mix((_mix(seed[0] ^ heads) + seed[1]) & _MASK)[..., None]
    line = _mix((stream + rows * 0x9E3779B1) & _MASK)[..., None]
    bits = _mix((line + cols * 0x85EBCA77) & _MASK)
    return bits >= int(dropout_p * 2**32)


def keep_mask(problem: Problem, like: Tensor, rows: slice | None = None, cols: slice | None = None) -> Tensor:
    """The keep mask of (a tile of) a plan `[N, H, L, S]`, as 0/1 in the dtype of `like`."""
    assert problem.dropout_seed is not None
    num, heads, length, size = problem.sizes
    device = like.device
    head = torch.arange(num * heads, device=device).view(num, heads)
    row = torch.arange(length, device=device)[rows or slice(None)]
    col = torch.arange(size, device=device)[cols or slice(None)]
    return keep_tile(problem.dropout_seed, head, row, col, problem.solver.dropout_p).to(like.dtype)
