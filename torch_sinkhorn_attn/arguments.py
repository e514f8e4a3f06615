"""Everything a user can get wrong stops here: user arguments in, `Inputs` and `Problem` out.

Shape and type checks come first, then the canonical layout, then (where data may be looked at) the checks of the data.
"""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from torch_sinkhorn_attn import data_checks
from torch_sinkhorn_attn.checks import data_checks_enabled
from torch_sinkhorn_attn.dustbin import Dustbin
from torch_sinkhorn_attn.mask_scan import scan_mask
from torch_sinkhorn_attn.problem import Inputs, Problem, compute_dtype
from torch_sinkhorn_attn.support import build_support, by_segment, segment_sum, token_ids

GRADIENTS = ("tail", "implicit", "unrolled")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Options(TypedDict, total=False):
    """The keyword options of `sinkhorn_attention`, documented there."""

    scale: float | None
    epsilon: float
    window: tuple[int, int] | None
    query_lengths: Tensor | None
    key_lengths: Tensor | None
    query_segment_ids: Tensor | None
    key_segment_ids: Tensor | None
    row_mass: Tensor | None
    col_mass: Tensor | None
    relaxation: float | tuple[float | None, float | None] | None
    dustbin: Dustbin | None
    base_iters: int
    tail_iters: int
    gradient: str
    initial_potentials: tuple[Tensor, Tensor] | None
    dropout_p: float
    enable_gqa: bool
    engine: str | None


class Prepared(NamedTuple):
    """Canonical tensors and problem, and what is needed to give the user's shapes back."""

    inputs: Inputs
    problem: Problem
    batch: torch.Size  # the user's leading dimensions, flattened to N
    dtype: torch.dtype  # of the output
    engine: str | None

    def unflatten(self, x: Tensor) -> Tensor:
        """`[N, ...]` back to `(..., ...)`."""
        return x.reshape(*self.batch, *x.shape[1:])


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    epsilon: float = 1.0,
    window: tuple[int, int] | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    query_segment_ids: Tensor | None = None,
    key_segment_ids: Tensor | None = None,
    row_mass: Tensor | None = None,
    col_mass: Tensor | None = None,
    relaxation: float | tuple[float | None, float | None] | None = None,
    dustbin: Dustbin | None = None,
    base_iters: int = 20,
    tail_iters: int = 2,
    gradient: str = "tail",
    initial_potentials: tuple[Tensor, Tensor] | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    engine: str | None = None,
) -> Prepared:
    """Check and canonicalise; `value` is None when only the plan is wanted."""
    query, key, value = _tokens(query, key, value, enable_gqa)
    batch, (heads, length, features), size = query.shape[:-3], query.shape[-3:], key.shape[-2]
    num, device, dtype = math.prod(batch), query.device, compute_dtype(query.dtype)
    epsilon = _positive("epsilon", epsilon)
    scale = 1 / math.sqrt(features) if scale is None else _number("scale", scale)
    left, right = _window(window)
    rho_row, rho_col = (tau / (tau + epsilon) if tau < math.inf else 1.0 for tau in _relaxation(relaxation))
    base_iters, tail_iters = _count("base_iters", base_iters), _count("tail_iters", tail_iters)
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient={gradient!r} is unknown; choose one of {', '.join(map(repr, GRADIENTS))}.")
    dropout_p = _number("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p} must lie in [0, 1).")
    if engine is not None and not isinstance(engine, str):
        raise TypeError(f"engine must be a name or None, got {engine!r}.")
    if dustbin is not None and not isinstance(dustbin, Dustbin):
        raise TypeError(f"dustbin must be a Dustbin or None, got {dustbin!r}; pass Dustbin(row_score, col_score).")

    mask = _mask(attn_mask, (*batch, heads, length, size), query)
    lengths = [
        _integers(name, x, batch, device)
        for name, x in (("query_lengths", query_lengths), ("key_lengths", key_lengths))
    ]
    segments = [
        _integers(name, x, (*batch, n), device)
        for name, x, n in (("query_segment_ids", query_segment_ids, length), ("key_segment_ids", key_segment_ids, size))
    ]
    if (segments[0] is None) != (segments[1] is None):
        raise ValueError(
            "query_segment_ids and key_segment_ids belong together: pass both (the same tensor in self-attention)."
        )
    masses = [
        _constant(name, x, (*batch, heads, n), query)
        for name, x, n in (("row_mass", row_mass, length), ("col_mass", col_mass, size))
    ]
    packed = segments[0] is not None
    num_bins = 0 if dustbin is None else (max(1, min(length, size)) if packed else 1)
    scores = _dustbin_tensors(dustbin, batch, heads, length, size, value, query)
    capacities = _capacities(dustbin, batch, heads, length, size, query)
    initial = _initial(initial_potentials, batch, heads, length + num_bins, size + num_bins, query)
    softmax_mode = base_iters == tail_iters == 0 and rho_row == rho_col == 1 and dustbin is None
    softmax_mode = softmax_mode and masses == [None, None]

    look = data_checks_enabled(query, key, value, mask, *lengths, *segments, *masses)
    window_request = f"window={(left, right)}" if window is not None else ""
    if look:
        data_checks.check_lengths(lengths[0], "query_lengths", length)
        data_checks.check_lengths(lengths[1], "key_lengths", size)
        data_checks.check_segments(segments[0], segments[1])
        data_checks.check_mask(mask)
        data_checks.check_dustbin_scores(dustbin)
        data_checks.check_potentials(initial)

    flat = [None if x is None else x.reshape(num) for x in lengths]
    row_ids = token_ids(num, length, flat[0], None if segments[0] is None else segments[0].reshape(num, length), device)
    col_ids = token_ids(num, size, flat[1], None if segments[1] is None else segments[1].reshape(num, size), device)
    support = build_support(row_ids, col_ids, None if window is None else (left, right), packed)
    scan = None if mask is None else scan_mask(mask, support, packed)
    row_active = (support.row_active[:, None] if scan is None else scan.row_active).expand(num, heads, length)
    col_active = (support.col_active[:, None] if scan is None else scan.col_active).expand(num, heads, size)
    row_segment, col_segment = (support.row_segment, support.col_segment) if packed else (None, None)

    groups = max(1, min(length, size)) if packed else 1
    mass_dtype = torch.float64 if look else dtype
    row_given, col_given = (None if x is None else x.to(mass_dtype).reshape(num, heads, -1) for x in masses)
    if look:
        data_checks.check_positive_mass("row_mass", row_given, row_active)
        data_checks.check_positive_mass("col_mass", col_given, col_active)
    a, b = _masses(row_given, col_given, row_active, col_active, row_segment, col_segment, groups, dustbin, mass_dtype)
    row_capacity, col_capacity = _default_capacities(capacities, a, b, row_segment, col_segment, num_bins, mass_dtype)
    if look and not softmax_mode:
        data_checks.check_feasibility(
            a, b, row_capacity, col_capacity, support, scan, capacities,
            row_segment=row_segment, col_segment=col_segment, groups=groups, rho=(rho_row, rho_col),
            full=not packed and window is None and mask is None, request=_request(window_request, mask),
        )  # fmt: skip

    problem = Problem(
        row_lo=support.row_lo, row_hi=support.row_hi, col_lo=support.col_lo, col_hi=support.col_hi,
        row_segment=row_segment, col_segment=col_segment,
        log_row_mass=_log(a, dtype), log_col_mass=_log(b, dtype),
        log_row_capacity=_log(row_capacity, dtype), log_col_capacity=_log(col_capacity, dtype),
        initial_row=initial[0], initial_col=initial[1],
        dropout_seed=_dropout_seed(dropout_p, device),
        scale=scale, epsilon=epsilon, rho_row=rho_row, rho_col=rho_col,
        base_iters=base_iters, tail_iters=tail_iters, gradient=gradient, dropout_p=dropout_p,
        banded=packed or window is not None, window_left=left, window_right=right,
        uniform=not packed and lengths == [None, None],
    )  # fmt: skip
    inputs = Inputs(*(None if x is None else x.reshape(num, *x.shape[len(batch) :]) for x in (query, key, value)), mask, *scores)
    return Prepared(inputs, problem, batch, query.dtype, engine)


def _tokens(query: Any, key: Any, value: Any, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Types, dtypes, devices and shapes of query, key and value; autocast applied."""
    given = {"query": query, "key": key} | ({} if value is None else {"value": value})
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}.")
        if x.is_nested:
            raise TypeError(f"{name} is a nested tensor; pad it (x.to_padded_tensor(0)) and pass lengths or segment ids.")
    if torch.is_autocast_enabled(query.device.type):
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
            raise ValueError(f"{name} has shape {tuple(x.shape)}; (..., heads, tokens, features) is needed: use {name}[None].")
        if x.shape[:-3] != query.shape[:-3]:
            raise ValueError(
                f"{name} has batch shape {tuple(x.shape[:-3])} but query has {tuple(query.shape[:-3])}; expand them to one."
            )
    if query.shape[-1] == 0:
        raise ValueError(f"query has shape {tuple(query.shape)}: at least one feature is needed.")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key has {key.shape[-1]} features but query has {query.shape[-1]}; they must agree.")
    if value is not None and (value.shape[-3:-1] != key.shape[-3:-1]):
        raise ValueError(
            f"value has (heads, tokens) {tuple(value.shape[-3:-1])} but key has {tuple(key.shape[-3:-1])}; they must agree."
        )
    heads, key_heads = query.shape[-3], key.shape[-3]
    if heads != key_heads and not enable_gqa:
        raise ValueError(f"query has {heads} heads but key has {key_heads}; pass enable_gqa=True for grouped queries.")
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"enable_gqa needs query heads ({heads}) to be a multiple of key heads ({key_heads}).")
    return query, key, value


def _number(name: str, x: Any) -> float:
    if isinstance(x, Tensor):
        if x.requires_grad:
            raise ValueError(f"{name} is a constant and cannot require grad; to learn it, scale the query instead.")
        raise TypeError(f"{name} must be a Python number, got a tensor; pass float({name}).")
    try:
        number = float(x) if not isinstance(x, (bool, str)) else None
    except (TypeError, ValueError):
        number = None
    if number is None:
        raise TypeError(f"{name} must be a number, got {x!r}.")
    if not math.isfinite(number):
        raise ValueError(f"{name}={number} must be finite.")
    return number


def _positive(name: str, x: Any) -> float:
    number = _number(name, x)
    if number <= 0:
        raise ValueError(f"{name}={number} must be positive.")
    return number


def _count(name: str, x: Any) -> int:
    try:
        count = operator.index(x) if not isinstance(x, (bool, Tensor)) else None
    except TypeError:
        count = None
    if count is None:
        raise TypeError(f"{name} must be an integer, got {x!r}.")
    if count < 0:
        raise ValueError(f"{name}={count} must be 0 or more.")
    return count


def _window(window: Any) -> tuple[int, int]:
    if window is None:
        return -1, -1
    try:
        sides = [operator.index(x) for x in window if not isinstance(x, bool)]
    except TypeError:
        sides = []
    if len(sides) != 2 or len(window) != 2:
        raise TypeError(f"window must be a pair of integers (left, right), got {window!r}; -1 lifts a side.")
    if min(sides) < -1:
        raise ValueError(f"window={tuple(sides)} must have sides of 0 or more, or -1 for unlimited.")
    return sides[0], sides[1]


def _relaxation(relaxation: Any) -> tuple[float, float]:
    """(row tau, column tau), inf where balanced."""
    pair = relaxation if isinstance(relaxation, (tuple, list)) else (relaxation, relaxation)
    if len(pair) != 2:
        raise TypeError(f"relaxation must be a number, a pair (row tau, column tau) or None, got {relaxation!r}.")
    taus = []
    for tau in pair:
        if tau is None or (isinstance(tau, (int, float)) and not isinstance(tau, bool) and tau == math.inf):
            taus.append(math.inf)
        else:
            taus.append(_positive("relaxation", tau))
    return taus[0], taus[1]


def _broadcasts(shape: tuple[int, ...] | torch.Size, target: tuple[int, ...]) -> bool:
    if len(shape) > len(target):
        return False
    return all(x in (1, y) for x, y in zip(shape[::-1], target[::-1], strict=False))


def _mask(mask: Any, shape: tuple[int, ...], query: Tensor) -> Tensor | None:
    """The caller's mask as a 4-D view broadcasting to [N, H, L, S]."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor, got {type(mask).__name__}.")
    if mask.dtype not in (torch.bool, *DTYPES):
        raise TypeError(f"attn_mask has dtype {mask.dtype}; use bool (True = keep) or a float mask added to the scores.")
    if mask.device != query.device:
        raise ValueError(f"attn_mask is on {mask.device} but query is on {query.device}; move it.")
    if not _broadcasts(mask.shape, shape):
        raise ValueError(f"attn_mask has shape {tuple(mask.shape)}, which does not broadcast to {shape}.")
    mask = mask.reshape(*(1,) * (len(shape) - mask.ndim), *mask.shape)
    lead, batch = mask.shape[:-3], shape[:-3]
    if math.prod(lead) == 1:
        return mask.reshape(1, *mask.shape[-3:])
    # Only a mask that broadcasts over some of several batch dimensions but not all is copied here.
    return mask.expand(*batch, *mask.shape[-3:]).reshape(math.prod(batch), *mask.shape[-3:])


def _integers(name: str, x: Any, shape: tuple[int, ...] | torch.Size, device: torch.device) -> Tensor | None:
    if x is None:
        return None
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be an integer tensor of shape {tuple(shape)}, got {kind}.")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device} but query is on {device}; move it.")
    if not _broadcasts(x.shape, tuple(shape)):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; {tuple(shape)} is needed.")
    return x.expand(shape)


def _constant(name: str, x: Any, shape: tuple[int, ...], query: Tensor) -> Tensor | None:
    """A floating-point constant expanded to `shape`."""
    if x is None:
        return None
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating-point tensor broadcasting to {shape}, got {kind}.")
    if x.requires_grad:
        raise ValueError(f"{name} is a constant and cannot require grad; pass {name}.detach().")
    if x.device != query.device:
        raise ValueError(f"{name} is on {x.device} but query is on {query.device}; move it.")
    if not _broadcasts(x.shape, shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, which does not broadcast to {shape}.")
    return x.expand(shape)


def _initial(given: Any, batch: torch.Size, heads: int, rows: int, cols: int, query: Tensor):
    if given is None:
        return None, None
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(f"initial_potentials must be a pair (row, column) as in SinkhornAux, got {type(given).__name__}.")
    pair = []
    for side, x, n in (("row", given[0], rows), ("column", given[1], cols)):
        name = f"initial_potentials ({side})"
        x = _constant(name, x, (*batch, heads, n), query)
        assert x is not None or given[0] is None or given[1] is None
        if x is None:
            raise TypeError(f"{name} is None; pass both potentials, or initial_potentials=None.")
        pair.append(x.to(compute_dtype(query.dtype)).reshape(-1, heads, n))
    return pair[0], pair[1]


def _dustbin_tensors(dustbin: Dustbin | None, batch, heads: int, length: int, size: int, value, query: Tensor):
    """(row_score [N, H, L], col_score [N, H, S], corner_score [N, H], value [N, H, Ev] or None), differentiable."""
    if dustbin is None:
        return None, None, None, None
    dtype, flat = compute_dtype(query.dtype), math.prod(batch)

    def expanded(name: str, x: Any, shape: tuple[int, ...]) -> Tensor:
        if not isinstance(x, Tensor):
            x = torch.full((), float(x), dtype=dtype, device=query.device)
        if x.device != query.device:
            raise ValueError(f"Dustbin {name} is on {x.device} but query is on {query.device}; move it.")
        if not _broadcasts(x.shape, shape):
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


def _capacities(dustbin: Dustbin | None, batch, heads: int, length: int, size: int, query: Tensor):
    """The user's capacities as [N, H, L] and [N, H, S], None where not given."""
    if dustbin is None:
        return None, None
    pair = []
    for name, x, n in (("row_capacity", dustbin.row_capacity, length), ("col_capacity", dustbin.col_capacity, size)):
        if x is not None and not isinstance(x, Tensor):
            x = torch.full((), float(x), dtype=torch.float64, device=query.device)
        x = _constant(f"Dustbin {name}", x, (*batch, heads, n), query)
        pair.append(None if x is None else x.reshape(-1, heads, n))
    return pair[0], pair[1]


def _masses(row, col, row_active, col_active, row_segment, col_segment, groups: int, dustbin, dtype):
    """a [N, H, L] and b [N, H, S]: the given ones, 0 where inactive, or the default: uniform with the other side's
    total in each problem; 1 with a dustbin."""
    row_on, col_on = row_active.to(dtype), col_active.to(dtype)
    a, b = (None if x is None else torch.where(on, x, 0.0) for x, on in ((row, row_active), (col, col_active)))
    if dustbin is not None:
        return row_on if a is None else a, col_on if b is None else b
    if a is None:
        a = row_on
        if b is not None:
            share = segment_sum(b, _heads(col_segment), groups) / segment_sum(row_on, _heads(row_segment), groups).clamp(min=1)
            a = row_on * by_segment(share, _heads(row_segment), row_on.shape[-1])
    if b is None:
        share = segment_sum(a, _heads(row_segment), groups) / segment_sum(col_on, _heads(col_segment), groups).clamp(min=1)
        b = col_on * by_segment(share, _heads(col_segment), col_on.shape[-1])
    return a, b


def _default_capacities(given, a: Tensor, b: Tensor, row_segment, col_segment, num_bins: int, dtype):
    """(row_capacity, col_capacity) [N, H, G], 0 for segments that do not exist."""
    if num_bins == 0:
        return None, None
    row_total = segment_sum(a, _heads(row_segment), num_bins)
    col_total = segment_sum(b, _heads(col_segment), num_bins)
    live = (row_total > 0) & (col_total > 0)
    row, col = (
        None if x is None else _per_problem(x.to(dtype), on > 0, segment, num_bins)
        for x, on, segment in ((given[0], a, row_segment), (given[1], b, col_segment))
    )
    if row is None and col is None:
        row, col = col_total, row_total
    elif row is None:
        row = col_total + col - row_total
    elif col is None:
        col = row_total + row - col_total
    return torch.where(live, row, 0.0), torch.where(live, col, 0.0)


def _per_problem(x: Tensor, active: Tensor, segment: Tensor | None, count: int) -> Tensor:
    """The value of a per-token constant in each problem: its largest over the active tokens."""
    index = torch.zeros_like(x, dtype=torch.int64) if segment is None else segment[:, None].expand(x.shape)
    out = torch.zeros(*x.shape[:-1], count, dtype=x.dtype, device=x.device)
    return out.scatter_reduce(-1, index, torch.where(active, x, 0.0), "amax")


def _heads(segment: Tensor | None) -> Tensor | None:
    return None if segment is None else segment[:, None]


def _log(mass: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if mass is None else mass.log().to(dtype)


def _dropout_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """Two 32-bit words from torch's generator of the device, so that torch.manual_seed governs dropout."""
    return None if dropout_p == 0 else torch.randint(0, 2**32, (2,), dtype=torch.int64, device=device)


def _request(window: str, mask: Tensor | None) -> str:
    parts = [window] if window else []
    if mask is not None:
        parts.append("attn_mask")
    return " with ".join(parts) if parts else "the support"
