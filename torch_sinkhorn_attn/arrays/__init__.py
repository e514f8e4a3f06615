"""One name for torch and for JAX: what both halves of the package compute alike stands once, over the functions of
`namespace(x)`. They are named and called as the array API standard has them; what it lacks, `of_torch` documents."""

from __future__ import annotations

import sys
from typing import Any

Array = Any  # a tensor of torch, or an array of JAX


def namespace(x: Array) -> Any:
    """The functions for arrays like `x`. Neither framework is imported for the other's."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        from torch_sinkhorn_attn.arrays import of_torch

        return of_torch
    from torch_sinkhorn_attn.arrays import of_jax

    return of_jax
