"""What `jax.shard_map` asks of code that runs inside it."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax


def vary_together(tree: Any) -> Any:
    """The arrays of a tree, each marked as varying over the manual mesh axes that any of them varies over: loops then
    carry one type throughout. The mark is differentiable, its transpose a sum over devices. Outside shard_map nothing
    is done."""
    axes = frozenset().union(*(_axes(x) for x in jax.tree.leaves(tree)))
    if not axes:
        return tree

    def mark(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - _axes(x)))
        if not missing:
            return x
        return lax.pcast(x, missing, to="varying") if hasattr(lax, "pcast") else lax.pvary(x, missing)

    return jax.tree.map(mark, tree)


def _axes(x: Any) -> frozenset[str]:
    kind = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):  # JAX 0.10
        return kind.manual_axis_type.varying
    return getattr(kind, "vma", frozenset())
