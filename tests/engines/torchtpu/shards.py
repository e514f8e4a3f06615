"""Run by test_engine.py with four devices: the functions that are registered on a mesh, against one device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from torch_sinkhorn_attn.engines.binding.shards import axes
from torch_sinkhorn_attn.engines.torchtpu import mesh
from torch_sinkhorn_attn.engines.torchtpu.program import Program, record
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
from torch_sinkhorn_attn.engines.tpu.method.problem import Statics

N, H, HK, L, S, E = 4, 4, 2, 12, 10, 6
STATICS = Statics(scale=E**-0.5, stopped=5, kept=2, dropout_p=0.3, uniform=False)


def randn(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def trees() -> list[dict[str, Any]]:
    inputs = {"query": randn(0, N, H, L, E), "key": randn(1, N, HK, S, E), "value": randn(2, N, HK, S, E)}
    inputs["mask"] = randn(3, N, 1, L, S)
    lengths = jnp.array([10, 7, 3, 9])[:, None]
    rows, cols = (jnp.where(jnp.arange(n) < lengths, 0.0, -jnp.inf)[:, None].repeat(H, 1) for n in (L, S))
    ends = [jnp.where(jnp.arange(n) < lengths, lengths, 0).astype(jnp.int32) for n in (L, S)]
    constants = {
        "row_lo": jnp.zeros((N, L), jnp.int32), "row_hi": ends[0], "col_lo": jnp.zeros((N, S), jnp.int32),
        "col_hi": ends[1], "log_row_mass": rows, "log_col_mass": cols,
        "dropout_seed": jnp.array([7, 9], jnp.uint32),
        "head_index": jnp.arange(N * H, dtype=jnp.int32).reshape(N, H),
    }  # fmt: skip
    return [inputs, constants]


def on_a_mesh(made: Program, leaves: list[jax.Array], place: mesh.Place) -> dict[str, jax.Array]:
    """What the registered function computes, from arrays laid out as its specs say."""
    whole = {name: x.shape for name, x in zip(made.names, leaves, strict=True)}
    sharded = mesh.sharded(made, {name: part(name, shape) for name, shape in whole.items()}, place)
    given = [jax.device_put(x, NamedSharding(place.mesh, s)) for x, s in zip(leaves, sharded.specs, strict=True)]
    given[made.names.index("head_index")] = jnp.zeros(whole["head_index"], jnp.int32)  # each rank's own count
    groups = sharded.grouped(given)
    found = jax.jit(sharded.function(), static_argnums=len(groups))(*groups, made.text())
    return dict(zip(made.results(whole), found, strict=True))


def part(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a rank's tensor: half of the batch, half of the heads."""
    split = [axis is not None and n > 1 for n, axis in zip(shape, axes(name, len(shape)), strict=True)]
    return tuple(n // 2 if half else n for n, half in zip(shape, split, strict=True))


def main() -> None:
    devices = np.array(jax.devices()).reshape(2, 2)
    place = mesh.Place(Mesh(devices, ("data", "model")), "data", "model")
    statics = {"statics": STATICS, "lowering": Lowering()}
    given = trees()
    made, leaves = record("forward", given, {**statics, "residuals": True})
    expected = made(leaves)
    found = on_a_mesh(made, leaves, place)
    assert expected.keys() == found.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-4, atol=1e-5, err_msg=name)
    cotangent = {name: expected[name] for name in ("output", "row_potentials", "col_potentials")}
    cotangent["grad_output"] = randn(5, N, H, L, E)
    made, leaves = record("backward", [*given, cotangent], {**statics, "mask_grad": True})
    truth, found = made(leaves), on_a_mesh(made, leaves, place)
    for name, x in truth.items():
        if name != "mask":  # of heads that are not split: each shard holds its own part
            np.testing.assert_allclose(found[name], x, rtol=1e-4, atol=1e-5, err_msg=name)
    print("agrees on", place.mesh.size, "devices")


if __name__ == "__main__":
    main()
