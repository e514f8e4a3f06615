"""What is known of every pair of residues, a part at a time: all or some of the pairs in some rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .evidence_kernels import averages_at
from .layers import diagonal_means

CELLS = 300_000
"""Pairs of residues that are looked at at once, where no gradient is wanted: those that are judged take some 300 bytes
each."""


@dataclass(frozen=True)
class Chosen:
    """Entries of maps [N, L, S] that are judged, in order, as indices of what is flattened, [entries] each: of [N L S],
    [N L], [N S] and [N]."""

    entry: Tensor
    row: Tensor
    column: Tensor
    pair: Tensor


@dataclass(frozen=True)
class Part:
    """Rows of some pairs of sequences, several rows of one or all rows of several, of [N, L, S]; all entries there, or
    those that are ``chosen``.

    What it gives of values of pairs of sequences, rows, columns and maps can be broadcast to [pairs, rows, S] for all
    entries, and to [1, 1, entries] for chosen ones.
    """

    pairs: slice
    rows: slice
    shape: tuple[int, int, int]
    chosen: Chosen | None = None

    def of_pairs(self, values: Tensor) -> Tensor:
        """Of [N]."""
        return values[self.pairs, None, None] if self.chosen is None else values[self.chosen.pair][None, None]

    def of_rows(self, values: Tensor) -> Tensor:
        """Of [N, L]."""
        if self.chosen is None:
            return values[self.pairs, self.rows, None]
        return values.flatten().index_select(0, self.chosen.row)[None, None]

    def of_columns(self, values: Tensor) -> Tensor:
        """Of [N, S]."""
        if self.chosen is None:
            return values[self.pairs, None]
        return values.flatten().index_select(0, self.chosen.column)[None, None]

    def of_maps(self, maps: Tensor) -> Tensor:
        """Of [N, L, S]."""
        here = maps[self.pairs, self.rows]
        return here if self.chosen is None else here.flatten().index_select(0, self._place(self.chosen))[None, None]

    def products(self, query: Tensor, key: Tensor) -> Tensor:
        """Inner products of [N, L, d] and [N, S, d]."""
        found = query[self.pairs, self.rows] @ key[self.pairs].transpose(1, 2)
        return found if self.chosen is None else found.flatten().index_select(0, self._place(self.chosen))[None, None]

    def averaged(self, maps: Callable[[slice, slice], Tensor], widths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Maps themselves and their ``diagonal_means``, [pairs, C, rows, S] and [pairs, len(widths) C, rows, S], or
        [1, ., 1, entries]. ``maps`` gives [pairs, C, rows, S] of some pairs' rows: neighbours are read too."""
        reach = max(widths) - 1
        first = max(self.rows.start - reach, 0)
        wide = maps(self.pairs, slice(first, min(self.rows.stop + reach, self.shape[1])))
        if self.chosen is None:
            inside = slice(self.rows.start - first, self.rows.stop - first)
            return wide[:, :, inside], diagonal_means(wide, widths)[:, :, inside]
        shift = (self.pairs.start * self.shape[1] + first) * self.shape[2]
        entries = self.chosen.entry - shift  # the rows lie one after the other in [N L S]
        here, means = averages_at(wide, entries, widths)
        return here[None, :, None], means[None, :, None]

    def _place(self, chosen: Chosen) -> Tensor:
        """In the flattened entries of the part."""
        return chosen.entry - (self.pairs.start * self.shape[1] + self.rows.start) * self.shape[2]


@dataclass(frozen=True)
class Parts:
    """All that is judged of maps of ``shape`` [N, L, S], in parts."""

    shape: tuple[int, int, int]
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, shape: tuple[int, int, int], where: Tensor | None = None) -> Parts:
        """Those ``where`` [N, L, S] is True, or all. With gradients, which need it all, in one part; without them a few
        pairs of sequences at a time, or rows of one: less memory, and what fits into a cache."""
        count, length, size = shape
        if torch.is_grad_enabled():
            pairs, rows = count, length
        else:
            pairs = max(CELLS // (length * size), 1)
            rows = min(max(CELLS // size, 128), length) if pairs == 1 else length
        parts = [
            Part(slice(first, min(first + pairs, count)), slice(start, min(start + rows, length)), shape)
            for first, start in itertools.product(range(0, count, pairs), range(0, length, rows))
        ]
        return cls(shape, tuple(parts if where is None else [_choose(part, where) for part in parts]))

    def judged(self, judge: Callable[[Part], Tensor], like: Tensor, otherwise: float) -> Tensor:
        """What ``judge`` says of every part, and ``otherwise`` of entries that are in none, [N, L, S]."""
        if len(self.parts) == 1 and self.parts[0].chosen is None:
            return judge(self.parts[0])
        found = like.new_full(self.shape, otherwise)
        for part in self.parts:
            if part.chosen is None:
                found[part.pairs, part.rows] = judge(part)
            elif len(part.chosen.entry):
                found.view(-1)[part.chosen.entry] = judge(part).flatten()
        return found


def _choose(part: Part, where: Tensor) -> Part:
    length, size = part.shape[1:]
    place = where[part.pairs, part.rows].flatten().nonzero()[:, 0]
    entry = place + (part.pairs.start * length + part.rows.start) * size
    row = entry.div(size, rounding_mode="floor")
    pair = row.div(length, rounding_mode="floor")
    column = entry - (row - pair) * size
    return Part(part.pairs, part.rows, part.shape, Chosen(entry, row, column, pair))
