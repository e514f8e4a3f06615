"""Checks of one argument at a time, of its type, shape and device: each returns the argument in canonical form or
raises a TypeError or ValueError that names it, its value and the way out."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn.engines import check_name
from torch_sinkhorn_attn.problem import compute_dtype
from torch_sinkhorn_attn.tensor_kinds import check_kind, plain_mask

WIDEST_WINDOW = 1 << 24  # wider sides mean the same, and the window's integers stay far from overflow
GRADIENTS = ("tail", "implicit", "unrolled")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tokens(query: Any, key: Any, value: Any, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Types, dtypes, devices and shapes of query, key and value; autocast applied."""
    given = {"query": query, "key": key} | ({} if value is None else {"value": value})
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}.")
        check_kind(name, x)
    if query.device.type != "meta" and torch.is_autocast_enabled(query.device.type):
        lower = torch.get_autocast_dtype(query.device.type)
        given = {k: x.to(lower) if x.is_floating_point() and x.dtype != torch.float64 else x for k, x in given.items()}
        query, key = given["query"], given["key"]
        value = given.get("value")
    for name, x in given.items():
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {x.dtype}; use float32, float64, bfloat16 or float16.")
        if x.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {x.dtype} but query has {query.dtype}; cast them to one dtype.")
        if x.device != query.device:
            raise ValueError(f"{name} is on {x.device} but query is on {query.device}; move them to one device.")
        if x.ndim < 3:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; (..., heads, tokens, features) is needed: use {name}[None]."
            )
        if x.shape[:-3] != query.shape[:-3]:
            batches = f"{tuple(x.shape[:-3])} but query has {tuple(query.shape[:-3])}"
            raise ValueError(f"{name} has batch shape {batches}; expand them to one.")
    if query.shape[-1] == 0:
        raise ValueError(f"query has shape {tuple(query.shape)}: at least one feature is needed.")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key has {key.shape[-1]} features but query has {query.shape[-1]}; they must agree.")
    if value is not None and (value.shape[-3:-1] != key.shape[-3:-1]):
        raise ValueError(
            f"value has (heads, tokens) {tuple(value.shape[-3:-1])} but key has {tuple(key.shape[-3:-1])}; "
            "they must agree."
        )
    heads, key_heads = query.shape[-3], key.shape[-3]
    if heads == 0:
        raise ValueError(f"query has shape {tuple(query.shape)}: at least one head is needed.")
    if heads != key_heads and not enable_gqa:
        raise ValueError(f"query has {heads} heads but key has {key_heads}; pass enable_gqa=True for grouped queries.")
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"enable_gqa needs query heads ({heads}) to be a multiple of key heads ({key_heads}).")
    return query, key, value


class Solver(NamedTuple):
    """The checked scalars of the iteration."""

    scale: float
    epsilon: float
    window: tuple[int, int] | None
    rho: tuple[float, float]  # (row, column) damping
    base_iters: int
    tail_iters: int
    tolerance: float  # 0: never
    over_relaxation: float
    gradient: str


def solver(
    features: int,
    dtype: torch.dtype,
    scale: Any,
    epsilon: Any,
    window: Any,
    relaxation: Any,
    base_iters: Any,
    tail_iters: Any,
    tolerance: Any,
    over_relaxation: Any,
    gradient: Any,
    engine: Any,
) -> Solver:
    """Everything about the iteration that can be checked without tensors; `dtype` is the compute dtype."""
    epsilon = positive("epsilon", epsilon)
    scale = 1 / math.sqrt(int(features)) if scale is None else number("scale", scale)
    if not abs(scale) / epsilon < torch.finfo(dtype).max:
        raise ValueError(
            f"epsilon={epsilon} is too small: scale / epsilon overflows {dtype}; the plan needs epsilon > 0."
        )
    rho = [_damping(tau, epsilon) for tau in relaxation_pair(relaxation)]
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient={gradient!r} is unknown; choose one of {', '.join(map(repr, GRADIENTS))}.")
    if engine is not None and not isinstance(engine, str):
        raise TypeError(f"engine must be a name or None, got {engine!r}.")
    check_name(engine)
    return Solver(
        scale,
        epsilon,
        None if window is None else window_sides(window),
        (rho[0], rho[1]),
        count("base_iters", base_iters),
        count("tail_iters", tail_iters),
        *base_options(tolerance, over_relaxation, gradient),
        gradient,
    )


def base_options(tolerance: Any, over_relaxation: Any, gradient: str) -> tuple[float, float]:
    """(tolerance, 0 for None; omega): what only a stopped base can have."""
    threshold = 0.0 if tolerance is None else number("tolerance", tolerance)
    if threshold < 0:
        raise ValueError(f"tolerance={threshold} must be 0 or more; None and 0 never stop early.")
    omega = number("over_relaxation", over_relaxation)
    if not 0 < omega < 2:
        raise ValueError(f"over_relaxation={omega} must lie between 0 and 2, both excluded; 1 is the plain iteration.")
    if gradient == "unrolled" and (tolerance is not None or omega != 1):
        given = f"over_relaxation={omega}" if tolerance is None else f"tolerance={threshold}"
        raise ValueError(
            f"{given} needs a stopped base, and gradient='unrolled' has none: it differentiates every iteration. Use "
            "gradient='tail' or 'implicit', or leave tolerance=None and over_relaxation=1."
        )
    return threshold, omega


def is_softmax(base_iters: int, tail_iters: int, relaxation: Any, dustbin: Any) -> bool:
    """T = R = 0, balanced, no dustbin: softmax attention (unless masses are given)."""
    return base_iters == tail_iters == 0 and relaxation is None and not dustbin


def number(name: str, x: Any) -> float:
    if isinstance(x, Tensor):
        if x.requires_grad:
            raise ValueError(f"{name} is a constant and cannot require grad; to learn it, scale the query instead.")
        raise TypeError(f"{name} must be a Python number, got a tensor; pass float({name}).")
    try:
        value = float(x) if not isinstance(x, (bool, str)) else None
    except (TypeError, ValueError):
        value = None
    if value is None:
        raise TypeError(f"{name} must be a number, got {x!r}.")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}={value} must be finite.")
    return value


def positive(name: str, x: Any) -> float:
    value = number(name, x)
    if value <= 0:
        raise ValueError(f"{name}={value} must be positive.")
    return value


def floor(x: Any) -> float | None:
    """`mask_floor`: a negative number, or None."""
    value = None if x is None else number("mask_floor", x)
    if value is not None and value >= 0:
        raise ValueError(f"mask_floor={value} must be negative, as -1e3, or None to keep every finite mask entry.")
    return value


def count(name: str, x: Any) -> int:
    try:
        value = operator.index(x) if not isinstance(x, (bool, Tensor)) else None
    except TypeError:
        value = None
    if value is None:
        raise TypeError(f"{name} must be an integer, got {x!r}.")
    if value < 0:
        raise ValueError(f"{name}={value} must be 0 or more.")
    return value


def window_sides(window: Any) -> tuple[int, int]:
    try:
        sides = [operator.index(x) for x in window if not isinstance(x, bool)]
    except TypeError:
        sides = []
    if len(sides) != 2 or len(window) != 2:
        raise TypeError(f"window must be a pair of integers (left, right), got {window!r}; -1 lifts a side.")
    if min(sides) < -1:
        raise ValueError(f"window={tuple(sides)} must have sides of 0 or more, or -1 for unlimited.")
    return min(sides[0], WIDEST_WINDOW), min(sides[1], WIDEST_WINDOW)


def relaxation_pair(relaxation: Any) -> tuple[float, float]:
    """(row tau, column tau), inf where balanced."""
    pair = relaxation if isinstance(relaxation, (tuple, list)) else (relaxation, relaxation)
    if len(pair) != 2:
        raise TypeError(f"relaxation must be a number, a pair (row tau, column tau) or None, got {relaxation!r}.")
    taus = []
    for tau in pair:
        if tau is None or (isinstance(tau, (int, float)) and not isinstance(tau, bool) and tau == math.inf):
            taus.append(math.inf)
        else:
            taus.append(positive("relaxation", tau))
    return taus[0], taus[1]


def _damping(tau: float, epsilon: float) -> float:
    """rho; of halves, whose sum does not overflow."""
    rho = (tau / 2) / (tau / 2 + epsilon / 2) if tau < math.inf else 1.0
    if not rho > 0:
        raise ValueError(
            f"relaxation={tau} is too small beside epsilon={epsilon}: tau / (tau + epsilon) is 0 in float64; "
            "a larger one is needed, or None for exact marginals."
        )
    return rho


def plain_relaxation(relaxation: Any) -> float | tuple[float | None, float | None] | None:
    """The shortest form of the same relaxation: None where balanced, one number for two equal ones."""
    row, col = (None if tau == math.inf else tau for tau in relaxation_pair(relaxation))
    return row if row == col else (row, col)


def broadcasts(shape: tuple[int, ...] | torch.Size, target: tuple[int, ...]) -> bool:
    if len(shape) > len(target):
        return False
    # A list and a plain zip: torch.compile traces neither a generator nor `strict` here.
    return all([x in (1, y) for x, y in zip(shape[::-1], target[::-1])])


def score_mask(mask: Any, shape: tuple[int, ...], query: Tensor) -> Tensor | None:
    """The caller's mask as a 4-D view broadcasting to [N, H, L, S]."""
    mask = plain_mask(mask, query.device)
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor, got {type(mask).__name__}.")
    check_kind("attn_mask", mask)
    if mask.dtype not in (torch.bool, *DTYPES):
        raise TypeError(
            f"attn_mask has dtype {mask.dtype}; use bool (True = keep) or a float mask added to the scores."
        )
    if mask.device != query.device:
        raise ValueError(f"attn_mask is on {mask.device} but query is on {query.device}; move it.")
    if not broadcasts(mask.shape, shape):
        raise ValueError(f"attn_mask has shape {tuple(mask.shape)}, which does not broadcast to {shape}.")
    mask = mask.reshape(*(1,) * (len(shape) - mask.ndim), *mask.shape)
    lead, batch = mask.shape[:-3], shape[:-3]
    if math.prod(lead) == 1:
        return mask.reshape(1, *mask.shape[-3:])
    # Only a mask that broadcasts over some of several batch dimensions but not all is copied here.
    return mask.expand(*batch, *mask.shape[-3:]).reshape(math.prod(batch), *mask.shape[-3:])


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
        raise ValueError(f"{name} has shape {tuple(x.shape)}; {tuple(shape)} is needed.")
    return x.expand(shape)


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
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(
            f"initial_potentials must be a pair (row, column) as in SinkhornAux, got {type(given).__name__}."
        )
    pair = []
    for side, x, n in (("row", given[0], rows), ("column", given[1], cols)):
        name = f"initial_potentials ({side})"
        x = constant(name, x, (*batch, heads, n), query)
        if x is None:
            raise TypeError(f"{name} is None; pass both potentials, or initial_potentials=None.")
        pair.append(x.to(compute_dtype(query.dtype)).reshape(math.prod(batch), heads, n))
    return pair[0], pair[1]
