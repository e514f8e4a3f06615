"""The columns that a rank holds, and how vectors over them are completed.

A rank *owns* its block of keys and *holds* those that its queries reach: all of them, or, in a band, its block and
halos as wide as the window. Vectors over held columns `[..., held]` are the same bits on every rank that holds a
column.

    rank 0   o o o h . . .
    rank 1   . h o o h . .        o owned, h halo
    rank 2   . . . h o o o
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from torch_sinkhorn_attn.distributed.wire import Wire

Span = tuple[int, int]  # columns [start, end)


class Columns(ABC):
    """Which columns rank `wire.rank` holds, `[start, end)`, and `owned`, its own among them."""

    def __init__(self, wire: Wire, counts: Sequence[int], held: Span):
        self.wire, self.counts = wire, list(counts)
        self.start, self.end = held
        first, end = blocks(counts)[wire.rank]
        self.owned = slice(first - self.start, end - self.start)

    @property
    def number(self) -> int:
        return self.end - self.start

    @abstractmethod
    def spread(self, own: Tensor, dim: int) -> Tensor:
        """What the owners have of the held columns."""

    @abstractmethod
    def sum(self, partial: Tensor) -> Tensor:
        """`[..., held]` summed over all ranks that hold a column."""

    @abstractmethod
    def lse(self, partial: Tensor) -> Tensor:
        """Likewise log sum exp."""

    @abstractmethod
    def home(self, partial: Tensor, dim: int) -> Tensor:
        """The sums of the owned columns."""

    @abstractmethod
    def candidates(self, partial: Tensor, dim: int, nothing: float) -> Tensor:
        """`[ranks, ...]`: what each rank that holds an owned column has for it, in the order of ranks; `nothing` where
        one does not."""

    def own(self, x: Tensor, dim: int = -1) -> Tensor:
        """The owned among the held."""
        return x.narrow(dim, self.owned.start, self.owned.stop - self.owned.start)


class AllColumns(Columns):
    """Every rank holds all. An all-reduce under log-add-exp is done in its halves: each owner gets the partial vectors
    of its block and gives the block's result to all, 2 (P-1)/P numbers for each column in two messages."""

    def __init__(self, wire: Wire, counts: Sequence[int]):
        super().__init__(wire, counts, (0, sum(counts)))

    def spread(self, own: Tensor, dim: int) -> Tensor:
        return self.wire.gathered(own, self.counts, dim)

    def sum(self, partial: Tensor) -> Tensor:
        return self.wire.all_reduce(partial)

    def lse(self, partial: Tensor) -> Tensor:
        if self.wire.size == 1:
            return partial
        return self.spread(self.wire.scattered(partial, self.counts, -1).logsumexp(0), -1)

    def home(self, partial: Tensor, dim: int) -> Tensor:
        return self.wire.scattered(partial, self.counts, dim).sum(0)

    def candidates(self, partial: Tensor, dim: int, nothing: float) -> Tensor:
        return self.wire.scattered(partial, self.counts, dim)


class BandColumns(Columns):
    """Every rank holds a span, and meets those whose spans overlap with its own: with two halos no wider than a block
    the two beside it. One message to each of them for a half-step, whatever the number of ranks."""

    def __init__(self, wire: Wire, counts: Sequence[int], held: Sequence[Span]):
        super().__init__(wire, counts, held[wire.rank])
        homes, own = blocks(counts), held[wire.rank]
        others = [r for r in range(wire.size) if r != wire.rank]
        self._shared = {r: _meet(own, held[r]) for r in others}
        self._lent = {r: _meet(homes[wire.rank], held[r]) for r in others}  # owned here, held there
        self._borrowed = {r: _meet(own, homes[r]) for r in others}

    def spread(self, own: Tensor, dim: int) -> Tensor:
        found = own.new_empty(*_resized(own, dim, self.number))
        self._at(found, (self.start + self.owned.start, self.start + self.owned.stop), dim).copy_(own)
        first = self.start + self.owned.start
        sent = {r: own.narrow(dim, a - first, b - a) for r, (a, b) in self._lent.items() if a < b}
        for r, part in self._swapped(own, sent, self._borrowed, dim).items():
            self._at(found, self._borrowed[r], dim).copy_(part)
        return found

    def sum(self, partial: Tensor) -> Tensor:
        return self._completed(partial, torch.add, 0.0)

    def lse(self, partial: Tensor) -> Tensor:
        return self._completed(partial, torch.logaddexp, -torch.inf)

    def home(self, partial: Tensor, dim: int) -> Tensor:
        total = self.own(partial, dim).clone()
        for r, found in self._returned(partial, dim).items():
            self._among_owned(total, r, dim).add_(found)
        return total

    def candidates(self, partial: Tensor, dim: int, nothing: float) -> Tensor:
        own = self.own(partial, dim)
        parts = self._returned(partial, dim) | {self.wire.rank: own}
        of_ranks = []
        for r in sorted(parts):
            of_ranks.append(torch.full_like(own, nothing))
            (of_ranks[-1] if r == self.wire.rank else self._among_owned(of_ranks[-1], r, dim)).copy_(parts[r])
        return torch.stack(of_ranks)

    def _returned(self, partial: Tensor, dim: int) -> dict[int, Tensor]:
        """What the others have for columns that are owned here, and get of theirs."""
        sent = {r: self._at(partial, span, dim) for r, span in self._borrowed.items() if span[0] < span[1]}
        return self._swapped(partial, sent, self._lent, dim)

    def _among_owned(self, owned: Tensor, rank: int, dim: int) -> Tensor:
        """The owned columns that the rank holds."""
        (a, b), first = self._lent[rank], self.start + self.owned.start
        return owned.narrow(dim, a - first, b - a)

    def _completed(self, partial: Tensor, add: object, nothing: float) -> Tensor:
        """In the order of ranks, so that all get the same bits."""
        sent = {r: self._at(partial, span, -1) for r, span in self._shared.items() if span[0] < span[1]}
        parts = self._swapped(partial, sent, self._shared, -1) | {self.wire.rank: partial}
        spans = self._shared | {self.wire.rank: (self.start, self.end)}
        total = torch.full_like(partial, nothing)
        for r in sorted(parts):
            place = self._at(total, spans[r], -1)
            place.copy_(add(place, parts[r]))  # type: ignore[operator]
        return total

    def _at(self, held: Tensor, span: Span, dim: int) -> Tensor:
        return held.narrow(dim, span[0] - self.start, span[1] - span[0])

    def _swapped(self, like: Tensor, sent: dict[int, Tensor], spans: dict[int, Span], dim: int) -> dict[int, Tensor]:
        shapes = {r: _resized(like, dim, b - a) for r, (a, b) in spans.items() if a < b}
        return self.wire.swapped(sent, shapes, like)


def columns_of(wire: Wire, counts: Sequence[int], reached: Sequence[Span] | None) -> Columns:
    """How the ranks hold their columns. `reached[r]`: those the queries of rank r reach; None: all.

    Spans are exchanged point to point where that is less than gathering them.
    """
    total = sum(counts)
    if reached is None or wire.size == 1:
        return AllColumns(wire, counts)
    held = [(min(a, c), max(b, d)) if a < b else (c, d) for (a, b), (c, d) in zip(reached, blocks(counts), strict=True)]
    most = max(sum(max(0, b - a) for a, b in (_meet(x, y) for y in held if y is not x)) for x in held)
    if most * wire.size >= 2 * total * (wire.size - 1):
        return AllColumns(wire, counts)
    return BandColumns(wire, counts, held)


def blocks(counts: Sequence[int]) -> list[Span]:
    """The span of each rank's block.

    >>> blocks([2, 3])
    [(0, 2), (2, 5)]
    """
    ends = list(accumulate(counts))
    return [(end - count, end) for end, count in zip(ends, counts, strict=True)]


def part(x: Tensor, at: Span, count: int) -> Tensor:
    """The lines `at` of an augmented vector of `count` real lines, and the dustbins' entries behind."""
    real = x[..., slice(*at)]
    return torch.cat([real, x[..., count:]], -1) if x.shape[-1] > count else real


def _meet(x: Span, y: Span) -> Span:
    start = max(x[0], y[0])
    return start, max(start, min(x[1], y[1]))


def _resized(x: Tensor, dim: int, size: int) -> tuple[int, ...]:
    shape = list(x.shape)
    shape[dim] = size
    return tuple(shape)
