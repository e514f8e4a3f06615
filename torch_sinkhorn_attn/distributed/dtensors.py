"""DTensors sharded along the sequence: their shards in, and a DTensor out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Sharding(NamedTuple):
    """How the query lies on its mesh."""

    mesh: Any
    placements: tuple[Any, ...]
    group: Any  # of the dimension that shards the sequence
    shape: tuple[int, ...]


def sharding_of(query: Any, sequence_group: Any) -> Sharding | None:
    """Of a DTensor `(..., H, L, E)` whose tokens one dimension of its mesh shards; None for anything else.

    Raises:
        ValueError: several dimensions shard the tokens, features are sharded, or the group given is another one.
    """
    if type(query).__name__ != "DTensor":
        return None
    sequence = [k for k, x in enumerate(query.placements) if x.is_shard(query.ndim - 2)]
    if not sequence:
        return None
    if len(sequence) > 1 or any(x.is_shard(query.ndim - 1) or x.is_partial() for x in query.placements):
        raise ValueError(
            f"query is a DTensor with placements {query.placements}; its tokens may be sharded over one dimension "
            f"of the "
            "mesh, batch and heads over others, and its features must be whole."
        )
    group = query.device_mesh.get_group(sequence[0])
    if sequence_group is not None and sequence_group is not group:
        raise ValueError(
            "sequence_group is not the group over which the DTensor's tokens are sharded; leave it out, it is "
            "read from "
            "the DTensor."
        )
    return Sharding(query.device_mesh, tuple(query.placements), group, tuple(query.shape))


def local(name: str, x: Any, sharding: Sharding) -> Any:
    """The shard of a key or value beside the query, of a DTensor placed likewise; a plain tensor is one already."""
    if type(x).__name__ != "DTensor":
        return x
    if x.device_mesh != sharding.mesh or tuple(x.placements) != sharding.placements:
        raise ValueError(
            f"{name} is a DTensor with placements {x.placements} but query has {sharding.placements}; redistribute it."
        )
    return x.to_local()


def wrapped(output: Tensor, sharding: Sharding) -> Tensor:
    """The output as a DTensor placed as the query."""
    from torch.distributed.tensor import DTensor

    shape = (*sharding.shape[:-1], output.shape[-1])
    stride = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        stride[dim] = stride[dim + 1] * shape[dim + 1]
    return DTensor.from_local(
        output.contiguous(),
        sharding.mesh,
        sharding.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=tuple(stride),
    )
