"""The binding's computations, whole or in shards of a `Placement`: same arguments, same results.

Shards are even: a batch that the devices do not divide is filled up with empty problems. Key heads that are fewer than
the shards are repeated. The cotangent of a mask shared by the batch, or by the heads, is the sum of the shards'.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch_xla.runtime as xr
from torch import Tensor
from torch_xla import _XLAC  # type: ignore[attr-defined]

from torch_sinkhorn_attn.engines.binding import program
from torch_sinkhorn_attn.engines.binding.library import Tensors
from torch_sinkhorn_attn.engines.binding.shards import EMPTY, axes
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
from torch_sinkhorn_attn.engines.xla import binding, sequence, spmd
from torch_sinkhorn_attn.engines.xla.spmd import Placement

_MANUAL = 4  # torch_xla's ShardingType.MANUAL


def platform() -> str:
    """JAX's name for torch_xla's device."""
    return binding.platform()


def lowering() -> Lowering:
    """What was asked for, or what suits the device."""
    return program.lowering(platform(), lambda: binding.device_kind())


def run(
    function: Callable[..., dict[str, Any]],
    trees: tuple[Tensors, ...],
    statics: dict[str, Any],
    output: Tensor | None = None,
) -> Tensors:
    """The function on the trees, in the shards that the output, or else the query, lies in.

    Raises:
        ValueError: a kernel for several devices, of which nothing says how they share the problem.
    """
    query = trees[0]["query"]
    assert query is not None
    place = spmd.placement(query, output)
    if place is not None and place.tokens > 1:
        return sequence.run(function.__name__, place, trees, statics)
    if place is not None:
        return _reduced(_in_shards(function, place, trees, statics), trees[0], place)
    if xr.is_spmd() and statics["lowering"].shape != "blockwise":
        raise ValueError(
            "XLA cannot split a kernel over devices, and nothing says how query is sharded: mark the attention's input "
            "(xs.mark_sharding along batch, heads and tokens), or say it: with "
            "torch_sinkhorn_attn.engines.xla.spmd.sharding(mesh, batch=..., heads=..., sequence=...)."
        )
    return binding.call(function, *trees, **statics)


def _reduced(found: Tensors, inputs: Tensors, place: Placement) -> Tensors:
    """The results, with cotangents of keys, values and masks that shards had copies of in the shapes of the inputs."""
    query, key, mask = inputs["query"], inputs["key"], inputs["mask"]
    assert query is not None and key is not None
    for name in ("key", "value"):
        x = found.get(name)
        if x is not None and x.shape[1] != key.shape[1]:
            found[name] = x.unflatten(1, (key.shape[1], x.shape[1] // key.shape[1])).sum(2)
    partial = found.get("mask")
    if partial is not None and mask is not None:  # each shard's part
        whole = partial[: query.shape[0]] if mask.shape[0] > 1 else partial
        shared = [dim for dim in (0, 1) if mask.shape[dim] == 1]
        found["mask"] = whole.sum(shared, keepdim=True) if shared else whole
    return found


def _in_shards(
    function: Callable[..., dict[str, Any]], place: Placement, trees: tuple[Tensors, ...], statics: dict[str, Any]
) -> Tensors:
    query = trees[0]["query"]
    assert query is not None
    num, heads = query.shape[:2]
    if heads % place.heads:
        raise ValueError(
            f"query has {heads} heads, which {place.heads} shards do not divide; shard them by a divisor, or the batch "
            "alone."
        )
    local = [{name: None if x is None else _shard(name, x, place) for name, x in tree.items()} for tree in trees]
    found = binding.call(function, *local, **statics)
    return {name: None if x is None else _joined(name, x, place, num) for name, x in found.items()}


def _shard(name: str, x: Tensor, place: Placement) -> Tensor:
    """This device's part, in a graph that is the same for all."""
    spec = axes(name, x.ndim)
    if name in ("key", "value") and x.shape[1] % place.heads:
        times = place.heads // math.gcd(x.shape[1], place.heads)
        x = x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)
    if name == "mask":  # one that is shared is whole in every shard
        spec = tuple(None if n == 1 else axis for n, axis in zip(x.shape, spec, strict=True))
    missing = -x.shape[spec.index(0)] % place.batch if 0 in spec else 0
    if missing:
        shape = list(x.shape)
        shape[spec.index(0)] = missing
        x = torch.cat([x, x.new_full(shape, -torch.inf if name in EMPTY else 0)], spec.index(0))
    x = x.clone()  # the annotation is of this use, and not the caller's
    _XLAC._xla_annotate_custom_sharding(x, place.sharding(spec))
    return _XLAC._spmd_full_to_shard_shape(x)


def _joined(name: str, x: Tensor, place: Placement, num: int) -> Tensor:
    """The tensor that the devices' parts make up, `num` long in N (a mask's cotangent is left as long as it is)."""
    spec = axes(name, x.ndim)
    shape = [n * (1 if axis is None else place.shape[axis]) for n, axis in zip(x.shape, spec, strict=True)]
    _XLAC._mark_manual_sharding(x, _XLAC.OpSharding([], [], [], _MANUAL))
    whole = _XLAC._spmd_shard_to_full_shape(x, place.sharding(spec), shape, x.dtype)
    where = spec.index(0)
    if whole.shape[where] > num and name != "mask":
        whole = whole.narrow(where, 0, num)
        _XLAC._xla_annotate_custom_sharding(whole, place.sharding(spec))
    return whole
