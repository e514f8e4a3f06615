"""One direction of reading the scores by tiles.

The column passes are the kernels of the row passes with query and key exchanged and the mask's tile transposed.
Exponents are in base 2, in which a TPU works.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array

from torch_sinkhorn_attn.engines.tpu.method.problem import Statics
from torch_sinkhorn_attn.engines.tpu.streaming.spans import Spans

LANES = 128  # of a TPU's vector


@dataclass(frozen=True)
class Reading:
    """The scores read along lines.

    Attributes:
        lines, across: `[N, Hl, n, E]`, `[N, Ha, m, E]`: query and key, or key and query.
        intervals: lo, hi `[N, n]` of the lines where they are tested entry by entry, else None.
        spans, most: the tiles each block of lines touches, and the number of tile steps, static or traced.
        mask: `[N', H', L, S]`, int8 for a boolean one, or None.
        mask_floor: a float mask drops what is at or below.
        streams: `[N * H]` int32, the bits of the dropout streams, or None.
        interpret: of `pallas_call`.
    """

    lines: Array
    across: Array
    heads: int
    transposed: bool
    intervals: tuple[Array, Array] | None
    spans: Spans
    most: int | Array
    mask: Array | None
    mask_floor: float
    streams: Array | None
    statics: Statics
    block: int
    tile: int
    interpret: Any
    vmem_limit: int

    @property
    def dtype(self) -> Any:
        return jnp.dtype("float64" if self.lines.dtype == jnp.float64 else "float32")

    @property
    def num(self) -> int:
        return int(self.lines.shape[0])

    @property
    def length(self) -> int:
        return int(self.lines.shape[2])

    @property
    def size(self) -> int:
        return int(self.across.shape[2])

    @property
    def has_inner_tiles(self) -> bool:
        """Whether a second kernel body, for tiles inside of all intervals, pays: hardly beside a narrow window."""
        left, right = self.statics.window_left, self.statics.window_right
        return min(left, right) < 0 or left + right + 2 > self.tile + self.block

    @property
    def blocks(self) -> int:
        return -(-self.length // self.block)
