"""Gaussian probes from a fixed seed: what stands in for vectors that nobody gave."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def probe(shape: Sequence[int], like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(like)
