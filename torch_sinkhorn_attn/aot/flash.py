"""JAX's own flash attention for TPUs, compiled in the same run: what a kernel of exact softmax attention costs."""

from __future__ import annotations

from dataclasses import dataclass

from torch_sinkhorn_attn.aot.bundles import compile_and_read, weighted

_TILE = 512
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
