"""JAX's own kernels of exact softmax attention for TPUs, compiled in the same run: what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch_sinkhorn_attn.aot.bundles import compile_and_read, weighted

_TILE, _BAND_TILES = 512, (256, 512)
_LENGTH = 8192
VECTOR = 8 * 128
"""Scores in a vector register."""


@dataclass(frozen=True)
class Flash:
    """Bundles per vector of 8 x 128 scores of the tiles visited, and the same counted without empty bundles."""

    forward: float
    backward: float
    forward_filled: float
    backward_filled: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def measure(topology: str, features: int = 64, dtype: str = "bfloat16") -> Flash:
    """Forward and backward of `jax.experimental.pallas.ops.tpu.flash_attention`, tiles of 512 x 512, length 8192.

    What its kernels do once per row (or column) of tiles counts once in 16 tiles.
    """
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention

    names = (
        "block_q block_k_major block_k block_q_major_dkv block_k_major_dkv block_q_dkv block_k_dkv "
        "block_q_dq block_k_dq block_k_major_dq"
    )
    sizes = BlockSizes(block_b=1, **dict.fromkeys(names.split(), _TILE))

    def gradients(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        attend = lambda *x: flash_attention(*x, block_sizes=sizes).astype(jnp.float32).sum()  # noqa: E731
        return jax.grad(attend, argnums=(0, 1, 2))(q, k, v)

    shape = jax.ShapeDtypeStruct((1, 1, _LENGTH, features), dtype)
    kernels = compile_and_read(gradients, [shape] * 3, topology).kernels
    vectors = _LENGTH**2 / VECTOR
    most = {0: 1 - _TILE / _LENGTH}
    cost = [
        [weighted(k.loops, skipped=most, filled=f) / vectors for k in kernels if ("bwd" in k.name) == backward]
        for f in (False, True)
        for backward in (False, True)
    ]
    return Flash(*(sum(part) for part in cost))


def measure_band(
    topology: str, length: int, window: tuple[int, int], features: int = 64, dtype: str = "bfloat16"
) -> dict[str, float]:
    """Forward and backward of JAX's splash attention over a band of one head (its local mask), by the better of two
    sizes of tiles.

    Returns:
        Bundles per 8 x 128 scores of the band, and the tile: `{"forward": .., "backward": .., "tile": ..}`.
    """
    return min(
        (_measure_band(topology, length, window, features, dtype, tile) for tile in _BAND_TILES),
        key=lambda found: found["forward"] + found["backward"],
    )


def _measure_band(
    topology: str, length: int, window: tuple[int, int], features: int, dtype: str, tile: int
) -> dict[str, float]:
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    left, right = window
    names = "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv block_kv_dkv_compute block_q_dq block_kv_dq"
    sides: dict[str, Any] = dict.fromkeys(names.split(), tile)
    sizes = splash_attention_kernel.BlockSizes(**sides)
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.LocalMask((length, length), (left, right), 0)])
    attend = splash_attention_kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)

    def gradients(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        return jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))(q, k, v)

    shape = jax.ShapeDtypeStruct((1, length, features), dtype)
    kernels = compile_and_read(gradients, [shape] * 3, topology).kernels
    vectors = (length * (left + right + 1) - (left * (left + 1) + right * (right + 1)) // 2) / VECTOR
    forward = [k for k in kernels if "fwd" in k.name.split("=")[0]]
    backward = [k for k in kernels if k not in forward]
    costs = (sum(weighted(k.loops) for k in part) / vectors for part in (forward, backward))
    return {**dict(zip(("forward", "backward"), costs, strict=True)), "tile": tile}
