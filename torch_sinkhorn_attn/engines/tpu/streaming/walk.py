"""The orders in which a streaming pass visits its tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from jax import Array
from jax.experimental import pallas as pl


class Place(NamedTuple):
    """Batch element, query head, block of lines and tile of a grid step."""

    num: Any
    head: Any
    block: Any
    tile: Any


class Walk(Protocol):
    """A grid; `scalars` are the prefetched integers, the first touched tile of each block of lines first."""

    @property
    def grid(self) -> tuple[Any, ...]: ...

    @property
    def order(self) -> tuple[Any, ...]: ...

    def place(self, ids: Sequence[Any], scalars: Sequence[Any]) -> Place: ...

    def new_lines(self, ids: Sequence[Any]) -> Any:
        """Whether the step's lines are not those of the step before."""

    def first(self, ids: Sequence[Any]) -> Any:
        """Whether the step is the first of those whose results are added up."""

    def last(self, ids: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class TilesOfLines:
    """Blocks of lines in any order, each over its tiles: for results along the lines."""

    num: int
    heads: int
    blocks: int
    most: int | Array

    @property
    def grid(self) -> tuple[Any, ...]:
        return self.num, self.heads, self.blocks, self.most

    @property
    def order(self) -> tuple[Any, ...]:
        return "parallel", "parallel", "parallel", "arbitrary"

    def place(self, ids: Sequence[Any], scalars: Sequence[Any]) -> Place:
        n, h, i, t = ids
        return Place(n, h, i, scalars[0][n * self.blocks + i] + t)

    def new_lines(self, ids: Sequence[Any]) -> Any:
        return ids[3] == 0

    def first(self, ids: Sequence[Any]) -> Any:
        return ids[3] == 0

    def last(self, ids: Sequence[Any]) -> Any:
        return ids[3] == pl.num_programs(3) - 1


@dataclass(frozen=True)
class HeadsOfTile:
    """Every tile in any order, each over the batch elements and heads that share it: for results of a mask's shape
    `[N', H', L, S]`."""

    num: int
    heads: int
    blocks: int
    tiles: int
    mask_num: int
    mask_heads: int

    @property
    def grid(self) -> tuple[Any, ...]:
        shared = self.num // self.mask_num, self.heads // self.mask_heads
        return self.mask_num, self.mask_heads, self.blocks, self.tiles, *shared

    @property
    def order(self) -> tuple[Any, ...]:
        return *("parallel",) * 4, "arbitrary", "arbitrary"

    def place(self, ids: Sequence[Any], scalars: Sequence[Any]) -> Place:
        n, h, i, t, other_n, other_h = ids
        return Place(n + other_n, h + other_h, i, t)

    def new_lines(self, ids: Sequence[Any]) -> Any:
        return ids[4] >= 0

    def first(self, ids: Sequence[Any]) -> Any:
        return (ids[4] == 0) & (ids[5] == 0)

    def last(self, ids: Sequence[Any]) -> Any:
        return (ids[4] == self.grid[4] - 1) & (ids[5] == self.grid[5] - 1)
