"""A genome-like sequence, made by a seed: families of repeats, copied with mutations into random background."""

from __future__ import annotations

import torch
from torch import Tensor

BASES = "ACGT"
MASKED = len(BASES)  # the token that stands for a base to be found


def genome(length: int, seed: int, repeats: int = 4, repeat_length: int = 48, share: float = 0.6) -> Tensor:
    """`[length]` bases 0..3, of which `share` lie in copies of `repeats` families, one base in ten mutated."""
    g = torch.Generator().manual_seed(seed)
    found = torch.randint(4, (length,), generator=g)
    families = torch.randint(4, (repeats, repeat_length), generator=g)
    place = 0
    while place + repeat_length <= length:
        if torch.rand((), generator=g) < share:
            copy = families[int(torch.randint(repeats, (), generator=g))]
            mutated = torch.rand(repeat_length, generator=g) < 0.1
            noise = torch.randint(4, (repeat_length,), generator=g)
            found[place : place + repeat_length] = torch.where(mutated, noise, copy)
        place += repeat_length
    return found


def masked(bases: Tensor, seed: int, share: float = 0.15) -> tuple[Tensor, Tensor]:
    """The bases with some hidden, and which."""
    hidden = torch.rand(bases.shape, generator=torch.Generator().manual_seed(seed)) < share
    return bases.masked_fill(hidden, MASKED), hidden
