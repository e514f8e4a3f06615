"""A case of it is run by test_api.py with four devices: `sinkhorn_attention` inside `jax.shard_map`, against one."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from torch_sinkhorn_attn.engines.tpu import Dustbin, sinkhorn_attention

CASES: dict[str, dict[str, Any]] = {
    "band": {"window": (9, 9)},
    "implicit": {"gradient": "implicit", "base_iters": 5},
    "tolerance": {"tolerance": 1e-3},
    "accelerated": {"acceleration": "chebyshev", "base_iters": 6},
    "packed, dustbin": {"base_iters": 3},
    "packed, dustbin, accelerated": {"acceleration": "chebyshev", "tolerance": 1e-3, "base_iters": 6},
}


def check(name: str) -> None:
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    q, k, v = (jax.random.normal(jax.random.key(i), (4, 4, 24, 8)) for i in range(3))
    lengths, ids = jnp.array([24, 20, 15, 24]), jnp.tile(jnp.arange(24) // 9, (4, 1))
    mask, score = jax.random.normal(jax.random.key(3), (24, 24)), jnp.float32(0.3)  # on every device

    def attend(q: Any, k: Any, v: Any, lengths: Any, ids: Any, mask: Any, score: Any) -> jax.Array:
        more: dict[str, Any] = {}
        if "packed" in name:
            more = {"query_segment_ids": ids, "key_segment_ids": ids, "dustbin": Dustbin(score, 0.1)}
        return sinkhorn_attention(q, k, v, mask, query_lengths=lengths, key_lengths=lengths, **CASES[name], **more)

    heads, batch, everywhere = P("data", "model"), P("data"), P()
    specs = (heads, heads, heads, batch, batch, everywhere, everywhere)
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=heads)

    def step(function: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        def loss(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = function(*arrays[:3], lengths, ids, *arrays[3:])
            return (out**2).sum(), out

        gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))(q, k, v, mask, score)
        return out, gradients

    (found, found_gradients), (expected, gradients) = step(sharded), step(attend)
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, heads), found.ndim), found.sharding
    for x, y in zip((found, *found_gradients), (expected, *gradients), strict=True):
        assert jnp.abs(x - y).max() < 1e-5 * max(1.0, float(jnp.abs(y).max())), name


if __name__ == "__main__":
    check(sys.argv[1])
