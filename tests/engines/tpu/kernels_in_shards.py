"""Run by test_lowering.py with two devices: kernels inside `jax.shard_map` with its own checks, lowered for a TPU (the
interpreter of kernels has no such checks), and arrays on a mesh with explicit axes."""

from __future__ import annotations

from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from torch_sinkhorn_attn.engines.tpu import Dustbin, Lowering, sinkhorn_attention

DATA = P("data")


def mesh_of(kind: AxisType) -> Any:
    return jax.make_mesh((2,), ("data",), axis_types=(kind,))


def gradients(function: Any) -> Any:
    def loss(*arrays: jax.Array) -> tuple[jax.Array, Any]:
        out, aux = function(*arrays)
        return (out**2).sum() + aux.row_dustbin.sum(), (out, aux)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


def attend(lowering: Lowering | None) -> Any:
    def function(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        options: dict[str, Any] = {"window": (6, 6), "base_iters": 2, "tail_iters": 1, "dustbin": Dustbin(0.1, 0.2)}
        return sinkhorn_attention(q, k, v, lowering=lowering, return_aux=True, **options)

    return function


def kernels_lower(shape: str, kind: AxisType) -> None:
    mesh = mesh_of(kind)
    sharded = jax.shard_map(attend(Lowering(shape)), mesh=mesh, in_specs=DATA, out_specs=DATA)
    x = jax.ShapeDtypeStruct((2, 1, 140, 8), jnp.bfloat16, sharding=NamedSharding(mesh, DATA))
    with jax.set_mesh(mesh):
        text = jax.export.export(gradients(sharded), platforms=["tpu"])(x, x, x).mlir_module()
    assert text.count("tpu_custom_call") > 5, (shape, kind)


def explicit_axes() -> None:
    """Values, gradients, aux and where they lie; a kernel is refused with the way out."""
    mesh = mesh_of(AxisType.Explicit)
    leaves = [jax.random.normal(jax.random.key(i), (2, 1, 20, 8)) for i in range(3)]
    expected = gradients(attend(None))(*leaves)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, DATA)) for x in leaves]
        found = gradients(attend(None))(*placed)
        try:
            attend(Lowering("auto"))(*placed)
        except ValueError as error:
            assert "inside jax.shard_map" in str(error), error
        else:
            raise AssertionError("a kernel was split")
    assert found[1][0].sharding.is_equivalent_to(NamedSharding(mesh, DATA), 4)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert jnp.abs(x - y).max() < 1e-5 * max(1.0, float(jnp.abs(y).max()))


if __name__ == "__main__":
    explicit_axes()
    kernels_lower("streaming", AxisType.Auto)
    kernels_lower("wavefront", AxisType.Auto)
    kernels_lower("resident", AxisType.Explicit)
