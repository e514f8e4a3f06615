"""Two modules from one seed, their inputs, and what counts as the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torch_sinkhorn_attn import SinkhornMultiheadAttention

D = torch.float64
N, L, S, E, H = 2, 5, 7, 12, 3
SOFTMAX = {"base_iters": 0, "tail_iters": 0}


def pair(dtype: torch.dtype = D, **options: Any) -> tuple[SinkhornMultiheadAttention, nn.MultiheadAttention]:
    """Ours in softmax mode and torch's, from one seed."""
    torch.manual_seed(3)
    ours = SinkhornMultiheadAttention(E, H, dtype=dtype, **options, **SOFTMAX)
    torch.manual_seed(3)
    return ours, nn.MultiheadAttention(E, H, dtype=dtype, **options)


def tokens(*lengths: int, dtype: torch.dtype = D, width: int = E) -> list[Tensor]:
    """Batch-first tokens `[N, length, width]`."""
    g = torch.Generator().manual_seed(1)
    return [torch.randn(N, n, width, generator=g, dtype=D).to(dtype) for n in lengths]


def same(found: Any, truth: Any, atol: float = 1e-12) -> bool:
    """Values, shapes, dtypes; None for None."""
    if found is None or truth is None:
        return found is truth
    return found.shape == truth.shape and found.dtype == truth.dtype and torch.allclose(found, truth, atol=atol)
