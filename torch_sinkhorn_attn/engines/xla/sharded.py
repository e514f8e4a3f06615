"""The computations of the engine, whole or in shards of a `Placement`: same arguments, same results.

Shards are even: a batch that the devices do not divide is filled up with empty problems. Key heads that are fewer than
the shards are repeated. The cotangent of a mask shared by the batch, or by the heads, is the sum of the shards'.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch_xla import _XLAC  # type: ignore[attr-defined]

from torch_sinkhorn_attn.engines.tpu import problem as tpu
from torch_sinkhorn_attn.engines.tpu import run
from torch_sinkhorn_attn.engines.xla import binding
from torch_sinkhorn_attn.engines.xla.spmd import Placement

Tensors = dict[str, Tensor | None]
_MANUAL = 4  # torch_xla's ShardingType.MANUAL
_TOKENS_ONLY = {"row_lo", "row_hi", "col_lo", "col_hi", "row_segment", "col_segment"}  # [N, ...]; others [N, H, ...]
_UNSHARDED = {"dropout_seed"}
_EMPTY = {"log_row_mass", "log_col_mass", "log_row_capacity", "log_col_capacity"}  # -inf is an empty problem


def solve(inputs: Tensors, constants: Tensors, place: Placement | None, **statics: Any) -> Tensors:
    """`run.solve`: row_potentials and col_potentials."""
    return _call(_solve, place, (inputs, constants), statics)


def forward(inputs: Tensors, constants: Tensors, place: Placement | None, **statics: Any) -> Tensors:
    """`run.forward`: the fields of its `Result`."""
    return _call(_forward, place, (inputs, constants), statics)


def backward(inputs: Tensors, constants: Tensors, place: Placement | None, given: Tensors, **statics: Any) -> Tensors:
    """`run.backward`: the fields of `Inputs`, and `dropped`. `given` is what it takes beside the problem, by name."""
    found = _call(_backward, place, (inputs, constants, given), statics)
    query, key, mask, partial = inputs["query"], inputs["key"], inputs["mask"], found["mask"]
    assert query is not None and key is not None
    for name in ("key", "value"):
        x = found[name]
        if x is not None and x.shape[1] != key.shape[1]:
            found[name] = x.unflatten(1, (key.shape[1], x.shape[1] // key.shape[1])).sum(2)
    if place is not None and partial is not None and mask is not None:  # each shard's part
        whole = partial[: query.shape[0]] if mask.shape[0] > 1 else partial
        shared = [dim for dim in (0, 1) if mask.shape[dim] == 1]
        found["mask"] = whole.sum(shared, keepdim=True) if shared else whole
    return found


def _solve(inputs: Any, constants: Any, **statics: Any) -> dict[str, Any]:
    row, col = run.solve(tpu.Inputs(**inputs), tpu.Constants(**constants), **statics)
    return {"row_potentials": row, "col_potentials": col}


def _forward(inputs: Any, constants: Any, **statics: Any) -> dict[str, Any]:
    return run.forward(tpu.Inputs(**inputs), tpu.Constants(**constants), **statics)._asdict()


def _backward(inputs: Any, constants: Any, given: Any, **statics: Any) -> dict[str, Any]:
    found, dropped = run.backward(tpu.Inputs(**inputs), tpu.Constants(**constants), **given, **statics)
    return {**found._asdict(), "dropped": dropped}


def _call(
    function: Callable[..., dict[str, Any]], place: Placement | None, trees: tuple[Tensors, ...], statics: Any
) -> Tensors:
    """`function` on the trees, in the shards of the placement."""
    if place is None:
        return binding.call(function, *trees, **statics)
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
    spec = _spec(name, x.ndim)
    if name in ("key", "value") and x.shape[1] % place.heads:
        times = place.heads // math.gcd(x.shape[1], place.heads)
        x = x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)
    if name == "mask":  # one that is shared is whole in every shard
        spec = tuple(None if n == 1 else axis for n, axis in zip(x.shape, spec, strict=True))
    missing = -x.shape[spec.index(0)] % place.batch if 0 in spec else 0
    if missing:
        shape = list(x.shape)
        shape[spec.index(0)] = missing
        x = torch.cat([x, x.new_full(shape, -torch.inf if name in _EMPTY else 0)], spec.index(0))
    x = x.clone()  # the annotation is of this use, and not the caller's
    _XLAC._xla_annotate_custom_sharding(x, place.sharding(spec))
    return _XLAC._spmd_full_to_shard_shape(x)


def _joined(name: str, x: Tensor, place: Placement, num: int) -> Tensor:
    """The tensor that the devices' parts make up, `num` long in N (a mask's cotangent is left as long as it is)."""
    spec = _spec(name, x.ndim)
    shape = [n * (1 if axis is None else place.shape[axis]) for n, axis in zip(x.shape, spec, strict=True)]
    _XLAC._mark_manual_sharding(x, _XLAC.OpSharding([], [], [], _MANUAL))
    whole = _XLAC._spmd_shard_to_full_shape(x, place.sharding(spec), shape, x.dtype)
    where = spec.index(0)
    if whole.shape[where] > num and name != "mask":
        whole = whole.narrow(where, 0, num)
        _XLAC._xla_annotate_custom_sharding(whole, place.sharding(spec))
    return whole


def _spec(name: str, ndim: int) -> tuple[int | None, ...]:
    """The axis of the placement that each dimension lies along: 0 the batch, 1 the heads, None neither."""
    if name in _UNSHARDED:
        return (None,) * ndim
    if name in _TOKENS_ONLY:
        return (0, *(None,) * (ndim - 1))
    front = (None,) if name in ("row_potentials", "col_potentials") else ()
    return (*front, 0, 1, *(None,) * (ndim - len(front) - 2))
