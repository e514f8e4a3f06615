"""torch's functions under the names of the array API standard, and a few that it lacks.

Those are of operations that XLA does right too: no cummax, cummin, searchsorted, nor cumsum of bool.
"""

from __future__ import annotations

import math

import torch
from torch import (  # noqa: F401
    Tensor,
    abs,
    amin as min,
    broadcast_to,
    clip,
    concat,
    cumsum,
    exp,
    inf,
    log,
    log2,
    logaddexp,
    logsumexp,
    round,
    where,
    zeros_like,
)

from torch_sinkhorn_attn.compat.tracing import recording

_DOUBLINGS = 24  # for any length, which a recorded program may not know


def astype(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


def take_along_axis(x: Tensor, index: Tensor, axis: int) -> Tensor:
    return x.gather(axis, index)


def arange(count: int, like: Tensor) -> Tensor:
    """0 .. count - 1 on the device of `like`: int64; int32 in JAX, as a TPU has no int64."""
    return torch.arange(count, device=like.device)


def max(x: Tensor, axis: int, keepdims: bool = False, initial: float = -torch.inf) -> Tensor:
    """As in NumPy, which has `initial`: what it is over none."""
    if x.shape[axis] == 0:
        x = torch.full_like(x.sum(axis, keepdim=True), initial)
    return x.amax(axis, keepdim=keepdims)


def unsplit(*vectors: Tensor) -> tuple[Tensor, ...]:
    """What is sorted or scattered along its last dimension, and what comes of it: whole on every device, where the
    engine of a device says that it cannot be split."""
    from torch_sinkhorn_attn.engines import engine_of

    return engine_of(vectors[0].device).unsplit(*vectors)


def add_at(x: Tensor, index: Tensor, count: int) -> Tensor:
    """Entries of the last dimension with the same index added up, `[..., n]` to `[..., count]`; `index` broadcasts to
    `x`."""
    if x.is_cuda:
        return add_in_order(x, index, count)
    x, index = unsplit(x, index)
    out = torch.zeros(*x.shape[:-1], count, dtype=x.dtype, device=x.device)
    return unsplit(out.scatter_add(-1, index.expand_as(x), x))[0]


def add_in_order(x: Tensor, index: Tensor, count: int) -> Tensor:
    """`add_at` whose bits are the same on a rerun on GPUs too: scatter_add's atomics add in any order there, where
    index_put sorts first."""
    lines = math.prod(x.shape[:-1])
    line = torch.arange(lines, device=x.device).view(*x.shape[:-1], 1)
    out = torch.zeros(lines * count, dtype=x.dtype, device=x.device)
    out = out.index_put(((line * count + index.expand_as(x)).flatten(),), x.flatten(), accumulate=True)
    return out.view(*x.shape[:-1], count)


def max_at(x: Tensor, index: Tensor, count: int) -> Tensor:
    """Their maximum likewise; -inf over none."""
    x, index = unsplit(x, index)
    out = x.new_full((*x.shape[:-1], count), -torch.inf).scatter_reduce(-1, index.expand_as(x), x, "amax")
    return unsplit(out)[0]


def last_marked(x: Tensor, marked: Tensor, before: bool = False) -> Tensor:
    """x at the last marked entry of the last dimension up to each entry (or only `before` it); 0 where there is none.

    >>> last_marked(torch.tensor([5, 6, 7]), torch.tensor([False, True, False]))
    tensor([0, 6, 6])
    """
    x, mark = unsplit(x, marked.to(torch.int64))
    rank = mark.cumsum(-1)
    kept = torch.zeros(*x.shape[:-1], x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    return unsplit(kept.scatter_add(-1, rank, x * mark).gather(-1, rank - mark if before else rank))[0]


def whole(x: Tensor, up: bool, limit: int) -> Tensor:
    """Numbers of any dtype rounded to int64, up or down, and brought within -limit and limit; NaN to 0."""
    if x.is_floating_point():
        x = x.nan_to_num(0.0).clamp(-limit, limit)
        x = x.ceil() if up else x.floor()
    return x.to(torch.int64).clamp(-limit, limit)


def running_max(x: Tensor) -> Tensor:
    """The highest of each entry of the last dimension and those before it.

    >>> running_max(torch.tensor([3, 1, 4, 2]))
    tensor([3, 3, 4, 4])
    """
    place = torch.arange(x.shape[-1], device=x.device)
    for doubling in range(_DOUBLINGS if recording() else (x.shape[-1] - 1).bit_length()):
        x = torch.maximum(x, x[..., (place - 2**doubling).clamp(min=0)])
    return x


def times_exp2(x: Tensor, power: Tensor) -> Tensor:
    """x times 2 to a power `[N, H]` that broadcasts over x's further dimensions; 0 stays 0 beside any."""
    return torch.where(x == 0, x, x * _exp2(power, x))


def over_exp2(x: Tensor, power: Tensor) -> Tensor:
    """x divided by it, which may be the smallest number there is."""
    return x / _exp2(power, x)


def _exp2(power: Tensor, like: Tensor) -> Tensor:
    return power.to(like.device, like.dtype).exp2().reshape(*power.shape, *[1] * (like.ndim - power.ndim))
