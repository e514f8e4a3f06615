"""What an array takes of a TPU core's memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp


def tile_bytes(shape: Iterable[int], dtype: Any) -> int:
    """Bytes of an array in VMEM, its last two dimensions in whole tiles of 8 x 128 words.

    >>> tile_bytes((8192, 64), jnp.bfloat16), tile_bytes((1, 8192), jnp.float32)
    (2097152, 262144)
    """
    size = jnp.dtype(dtype).itemsize
    *outer, lines, lanes = shape
    rows = 8 * max(1, 4 // size)
    return math.prod(outer) * (-(-lines // rows) * rows) * (-(-lanes // 128) * 128) * size
