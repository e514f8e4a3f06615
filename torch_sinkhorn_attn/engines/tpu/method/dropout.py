"""Dropout numbers as a pure function of (seed, head, row, column): those of
`torch_sinkhorn_attn.method.dropout`, bit for bit.

Counter-based: Murmur3's finaliser (A. Appleby, public domain) over the entry's coordinates, in uint32, which wraps.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from torch_sinkhorn_attn.engines.tpu.method.problem import Constants

_ROW, _COLUMN = np.uint32(0x9E3779B1), np.uint32(0x85EBCA77)


def mix(x: Array) -> Array:
    """Murmur3's 32-bit finaliser on uint32."""
    x = x ^ (x >> 16)
    x = x * np.uint32(0x85EBCA6B)
    x = x ^ (x >> 13)
    x = x * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def streams(seed: Array, heads: Array) -> Array:
    """The stream of each head, of the shape of `heads`: flat indices n * H + h. seed: `[2]` uint32."""
    return mix(mix(seed[0] ^ heads.astype(jnp.uint32)) + seed[1])


def head_streams(constants: Constants) -> Array:
    """The stream of each head of a problem with dropout, `[N, H]` uint32."""
    assert constants.dropout_seed is not None
    heads = constants.head_index
    if heads is None:
        num, count = constants.log_row_mass.shape[:2]
        heads = jnp.arange(num * count, dtype=jnp.int32).reshape(num, count)
    return streams(constants.dropout_seed, heads)


def keep(stream: Array, rows: Array, cols: Array, dropout_p: float) -> Array:
    """True keeps the entry, with probability 1 - dropout_p. The stream, rows and columns broadcast to one shape."""
    line = mix(stream + rows.astype(jnp.uint32) * _ROW)
    return mix(line + cols.astype(jnp.uint32) * _COLUMN) >= np.uint32(int(dropout_p * 2**32))
