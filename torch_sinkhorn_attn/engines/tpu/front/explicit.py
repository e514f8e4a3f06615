"""Arrays that lie on a mesh with explicit axes, so that shardings are part of their types.

They are computed with automatic axes, and the results lie as the query does. XLA cannot split a kernel over devices, so
that is plain XLA; inside `jax.shard_map`, where each device has problems of its own, nothing of this is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes

from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
from torch_sinkhorn_attn.engines.tpu.releases import use_mesh


def placement(arguments: dict[str, Any]) -> NamedSharding | None:
    """The sharding of the query, or of the first of the other arrays, that names explicit axes; None if none does."""
    arrays = [arguments["query"], *jax.tree.leaves(arguments)]
    for kind in (jax.typeof(x) for x in arrays if isinstance(x, jax.Array)):
        found = getattr(kind, "sharding", None)
        if found is not None and AxisType.Explicit in found.mesh.axis_types and any(x is not None for x in found.spec):
            return NamedSharding(found.mesh, found.spec)
    return None


def with_automatic_axes(
    function: Callable[..., Any], place: NamedSharding, arguments: dict[str, Any], dimensions: Any
) -> Any:
    """`function(**arguments)`, with automatic axes inside.

    Args:
        place: what `placement` found.
        dimensions: the tree of the results, a number of dimensions in the place of each; all begin with the query's
            batch and heads.

    Raises:
        ValueError: a kernel was asked for, and the mesh has several devices.
    """
    asked = arguments["lowering"] or Lowering()
    if place.mesh.size > 1 and asked.shape != "blockwise":
        if asked.shape != "device":
            raise ValueError(
                f"lowering={asked} is a kernel, which XLA cannot split over the {place.mesh.size} devices of a mesh "
                "with explicit axes; call sinkhorn_attention inside jax.shard_map, along batch and heads, or leave "
                "lowering out."
            )
        arguments = {**arguments, "lowering": Lowering("blockwise")}
    leaves, structure = jax.tree.flatten(arguments)
    moving = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]

    def compute(*arrays: jax.Array) -> Any:
        merged = list(leaves)
        for i, x in zip(moving, arrays, strict=True):
            merged[i] = x
        return function(**jax.tree.unflatten(structure, merged))

    arrays = [leaves[i] for i in moving]
    query = jax.typeof(arguments["query"])
    own = getattr(query.sharding, "spec", ())
    batch_and_heads = (*own, *(None,) * query.ndim)[: query.ndim - 2]

    def lies(dimensions: int) -> NamedSharding:
        return NamedSharding(place.mesh, PartitionSpec(*(*batch_and_heads, None, None)[:dimensions]))

    with use_mesh(place.mesh):
        return auto_axes(compute, out_sharding=jax.tree.map(lies, dimensions))(*arrays)
