"""Run by test_sequence.py with three devices: kernels over a sharded sequence, by JAX's interpreter of TPUs, which has
remote copies between devices, against plain XLA on one."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P

from torch_sinkhorn_attn.engines.tpu import Lowering, sinkhorn_attention
from torch_sinkhorn_attn.engines.tpu.method import batching
from torch_sinkhorn_attn.engines.tpu.releases import interpreter

DEVICES, BLOCK, AXIS = 3, 256, "cp"
TOKENS = P(None, None, AXIS)


def step(axis: str | None, lowering: Lowering) -> Any:
    def attend(*tokens: jax.Array) -> Any:
        options = {"window": (128, 128), "base_iters": 1, "tail_iters": 2, "return_aux": True}
        return sinkhorn_attention(*tokens, sequence_axis=axis, lowering=lowering, **options)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array) -> Any:
        (output, aux), pull = jax.vjp(attend, q, k, v)
        return output, aux.row_potential, aux.col_potential, *pull((grad, jax.tree.map(jnp.zeros_like, aux)))

    return both


def check(shape: str) -> None:
    arrays = [jax.random.normal(jax.random.key(i), (1, 1, DEVICES * BLOCK, 8)) for i in range(4)]
    mesh = jax.make_mesh((DEVICES,), (AXIS,), axis_types=(AxisType.Auto,))
    expected = jax.jit(step(None, Lowering("blockwise")))(*arrays)
    kernels = step(AXIS, Lowering(shape, interpret=interpreter(), generation="v6e"))
    run = jax.shard_map(kernels, mesh=mesh, in_specs=(TOKENS,) * 4, out_specs=(TOKENS,) * 6, check_vma=False)
    for x, y in zip(jax.jit(run)(*arrays), expected, strict=True):
        assert jnp.abs(x - y).max() < 2e-5 * max(1.0, float(jnp.abs(y).max())), shape


if __name__ == "__main__":
    # The interpreter's ordered effects and custom_vmap do not go together.
    batching._foldable = lambda function, *_, **__: function  # type: ignore[assignment]
    check(sys.argv[1])
