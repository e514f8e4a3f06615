"""What `jax.shard_map` asks of code that runs inside it."""

from __future__ import annotations

from typing import Any

import jax

from torch_sinkhorn_attn.engines.tpu.releases import mark_varying, varying_axes


def vary_together(tree: Any) -> Any:
    """The arrays of a tree, each marked as varying over the manual mesh axes that any of them varies over: loops then
    carry one type throughout. The mark is differentiable, its transpose a sum over devices. Outside shard_map nothing
    is done."""
    axes = frozenset().union(*(varying_axes(x) for x in jax.tree.leaves(tree)))
    if not axes:
        return tree

    def mark(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - varying_axes(x)))
        if not missing:
            return x
        return mark_varying(x, missing)

    return jax.tree.map(mark, tree)


def vary_like(x: jax.Array, source: jax.Array) -> jax.Array:
    """x, marked as varying over the manual mesh axes that `source` varies over: what a reduction gives back to a loop
    that carries it."""
    missing = tuple(sorted(varying_axes(source) - varying_axes(x)))
    return mark_varying(x, missing) if missing else x
