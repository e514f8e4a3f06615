"""What is known of every pair of residues, a part at a time: some pairs of sequences, or some rows of one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CELLS = 150_000
"""Pairs of residues that are judged at once, where no gradient is wanted: each takes some 300 bytes."""


class Part(NamedTuple):
    """Rows of some pairs of sequences; an index of what is [N, L, ...]."""

    pairs: slice
    rows: slice

    def with_neighbours(self, length: int, widths: tuple[int, ...]) -> tuple[Part, slice]:
        """With the rows that averages along diagonals over ``widths`` read for these, and where these are in it."""
        reach = max(widths) - 1
        first = max(self.rows.start - reach, 0)
        wide = slice(first, min(self.rows.stop + reach, length))
        return Part(self.pairs, wide), slice(self.rows.start - first, self.rows.stop - first)


def in_parts(evidence: Callable[[Part], Tensor], like: Tensor) -> Tensor:
    """Evidence [N, L, S], a few pairs of sequences at a time, or rows of one: less memory, and what fits into a cache.

    With gradients, which need it all, at once. ``like`` is [N, L, S].
    """
    count, length, size = like.shape
    if torch.is_grad_enabled():
        return evidence(Part(slice(0, count), slice(0, length)))
    pairs = max(CELLS // (length * size), 1)
    rows = min(max(CELLS // size, 128), length) if pairs == 1 else length
    found = like.new_empty(like.shape)
    for first, start in itertools.product(range(0, count, pairs), range(0, length, rows)):
        part = Part(slice(first, min(first + pairs, count)), slice(start, min(start + rows, length)))
        found[part] = evidence(part)
    return found
