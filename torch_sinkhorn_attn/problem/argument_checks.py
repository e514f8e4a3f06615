"""Checks of one argument at a time, of its type, shape and device: each returns the argument in canonical form or
raises a TypeError or ValueError that names it, its value and the way out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torch_sinkhorn_attn.dustbin import Dustbin
from torch_sinkhorn_attn.engines import check_name
from torch_sinkhorn_attn.options import DEFAULTS, Options
from torch_sinkhorn_attn.problem import shapes
from torch_sinkhorn_attn.problem.problem import compute_dtype
from torch_sinkhorn_attn.problem.shapes import broadcasts
from torch_sinkhorn_attn.problem.tensor_kinds import check_kind, plain_mask

_NUMBERS = ("scale", "epsilon", "relaxation", "tolerance", "over_relaxation", "contraction", "mask_floor", "dropout_p")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tokens(query: Any, key: Any, value: Any, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Types, dtypes, devices and shapes of query, key and value; autocast applied."""
    given = {"query": query, "key": key} | ({} if value is None else {"value": value})
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}.")
        check_kind(name, x)
    given = {name: lower_precision(x) for name, x in given.items()}
    query, key, value = given["query"], given["key"], given.get("value")
    for name, x in given.items():
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {x.dtype}; use float32, float64, bfloat16 or float16.")
        if x.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {x.dtype} but query has {query.dtype}; cast them to one dtype.")
        if x.device != query.device:
            raise ValueError(f"{name} is on {x.device} but query is on {query.device}; move them to one device.")
    found = [None if x is None else tuple(x.shape) for x in (query, key, value)]
    shapes.token_shapes(found[0], found[1], found[2], enable_gqa)  # type: ignore[arg-type]
    return query, key, value


def lower_precision(x: Tensor) -> Tensor:
    """What autocast, where it is on, makes of a tensor."""
    if x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
        return x
    lowered = x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(x.device.type)) if lowered else x


def no_tensors(**options: Any) -> None:
    """TypeError or ValueError for a tensor where a Python number is compiled in."""
    for name, given in options.items():
        for x in given if isinstance(given, (tuple, list)) else (given,):
            if not isinstance(x, Tensor):
                continue
            if x.requires_grad:
                raise ValueError(f"{name} is a constant and cannot require grad; to learn it, scale the query instead.")
            raise TypeError(f"{name} must be a Python number, got a tensor; pass float({name}).")


def options(keywords: Mapping[str, Any]) -> Options:
    """The scalars among the keyword arguments, checked: no tensors, and an engine that exists."""
    given = {name: x for name, x in keywords.items() if name in DEFAULTS and x is not DEFAULTS[name]}
    for name in ("base_iters", "tail_iters"):
        if isinstance(given.get(name), Tensor):
            raise TypeError(f"{name} must be an integer, got {given[name]!r}.")
    no_tensors(**{name: x for name, x in given.items() if name in _NUMBERS})
    checked = Options.of(given)
    check_name(checked.engine)
    return checked


def score_mask(mask: Any, shape: tuple[int, ...], query: Tensor) -> Tensor | None:
    """The caller's mask as a 4-D view broadcasting to [N, H, L, S]."""
    mask = plain_mask(mask, query.device)
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor, got {type(mask).__name__}.")
    check_kind("attn_mask", mask)
    if mask.device != query.device:
        raise ValueError(f"attn_mask is on {mask.device} but query is on {query.device}; move it.")
    return shapes.score_mask(mask, shape, (torch.bool, *DTYPES))


def integers(name: str, x: Any, shape: tuple[int, ...] | torch.Size, device: torch.device) -> Tensor | None:
    if x is None:
        return None
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be an integer tensor of shape {tuple(shape)}, got {kind}.")
    check_kind(name, x)
    if x.device != device:
        raise ValueError(f"{name} is on {x.device} but query is on {device}; move it.")
    if not broadcasts(x.shape, tuple(shape)):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; {tuple(shape)} is needed, one for each batch element (query is "
            "(..., heads, tokens, features)), or one more dimension, heads, before the tokens: one for each head."
        )
    return x.expand(shape)


def positions(name: str, x: Any, shape: tuple[int, ...], query: Tensor) -> Tensor | None:
    """Places on an axis of tokens, or between them, expanded to `shape`."""
    if isinstance(x, Tensor) and not x.is_floating_point():
        return integers(name, x, shape, query.device)
    if x is not None and (not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64)):
        raise TypeError(shapes.not_positions(name, shape, x.dtype if isinstance(x, Tensor) else type(x).__name__))
    return constant(name, x, shape, query)


def constant(name: str, x: Any, shape: tuple[int, ...], query: Tensor) -> Tensor | None:
    """A floating-point constant expanded to `shape`."""
    if x is None:
        return None
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating-point tensor broadcasting to {shape}, got {kind}.")
    check_kind(name, x)
    if x.requires_grad:
        raise ValueError(f"{name} is a constant and cannot require grad; pass {name}.detach().")
    if x.device != query.device:
        raise ValueError(f"{name} is on {x.device} but query is on {query.device}; move it.")
    if not broadcasts(x.shape, shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, which does not broadcast to {shape}.")
    return x.expand(shape)


def potentials(
    given: Any, batch: torch.Size, heads: int, rows: int, cols: int, query: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """A warm start as `[N, H, rows]` and `[N, H, cols]`."""
    if given is None:
        return None, None
    pair = []
    for (name, x), n in zip(shapes.potential_pair(given), (rows, cols), strict=True):
        x = constant(name, x, (*batch, heads, n), query)
        assert x is not None
        pair.append(x.to(compute_dtype(query.dtype)).reshape(math.prod(batch), heads, n))
    return pair[0], pair[1]


def dustbin_tensors(
    dustbin: Dustbin | None,
    batch: torch.Size,
    heads: int,
    length: int,
    size: int,
    value: Tensor | None,
    query: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(row_score [N, H, L], col_score [N, H, S], corner_score [N, H], value [N, H, Ev] or None), differentiable."""
    if dustbin is None:
        return None, None, None, None
    dtype, flat = compute_dtype(query.dtype), math.prod(batch)

    def expanded(name: str, x: Any, shape: tuple[int, ...]) -> Tensor:
        if not isinstance(x, Tensor):
            x = torch.full((), float(x), dtype=dtype, device=query.device)
        if x.device != query.device:
            raise ValueError(f"Dustbin {name} is on {x.device} but query is on {query.device}; move it.")
        if not broadcasts(x.shape, shape):
            raise ValueError(
                f"Dustbin {name} has shape {tuple(x.shape)}, which does not broadcast to {shape}; per head is (H, 1)."
            )
        return x.to(dtype).expand(shape).reshape(flat, *shape[len(batch) :])

    vector = None
    if dustbin.value is not None and value is not None:
        vector = expanded("value", dustbin.value, (*batch, heads, value.shape[-1]))
    return (
        expanded("row_score", dustbin.row_score, (*batch, heads, length)),
        expanded("col_score", dustbin.col_score, (*batch, heads, size)),
        expanded("corner_score", dustbin.corner_score, (*batch, heads)),
        vector,
    )


def given_capacities(
    dustbin: Dustbin | None, batch: torch.Size, heads: int, length: int, size: int, query: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The user's capacities as [N, H, L] and [N, H, S], None where not given."""
    if dustbin is None:
        return None, None
    pair = []
    for name, x, n in (("row_capacity", dustbin.row_capacity, length), ("col_capacity", dustbin.col_capacity, size)):
        if x is not None and not isinstance(x, Tensor):
            x = torch.full((), float(x), dtype=torch.float64, device=query.device)
        x = constant(f"Dustbin {name}", x, (*batch, heads, n), query)
        pair.append(None if x is None else x.reshape(math.prod(batch), heads, n))
    return pair[0], pair[1]
