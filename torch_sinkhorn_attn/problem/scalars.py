"""Checks of one argument at a time that torch's function and JAX's share: each returns the argument in canonical form
or raises a TypeError or ValueError that names it, its value and the way out. Numbers are Python's here: what is no
number of theirs, the callers refuse before."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

from torch_sinkhorn_attn.arrays import Array, namespace

WIDEST_WINDOW = 1 << 24  # wider sides mean the same, and the window's integers stay far from overflow
CONVERGED_WITHIN = 1e-2  # of a token's mean mass
GRADIENTS = ("tail", "implicit", "unrolled")
_LARGEST = {"float32": 3.4028234663852886e38, "float64": 1.7976931348623157e308}


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
    compute_dtype: str,
    scale: Any,
    epsilon: Any,
    window: Any,
    relaxation: Any,
    base_iters: Any,
    tail_iters: Any,
    tolerance: Any,
    over_relaxation: Any,
    gradient: Any,
) -> Solver:
    """Everything about the iteration; `compute_dtype` is "float32" or "float64"."""
    epsilon = positive("epsilon", epsilon)
    scale = 1 / math.sqrt(int(features)) if scale is None else number("scale", scale)
    if not abs(scale) / epsilon < _LARGEST[compute_dtype]:
        raise ValueError(
            f"epsilon={epsilon} is too small: scale / epsilon overflows {compute_dtype}; the plan needs epsilon > 0."
        )
    rho = [_damping(tau, epsilon) for tau in relaxation_pair(relaxation)]
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient={gradient!r} is unknown; choose one of {', '.join(map(repr, GRADIENTS))}.")
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
        value = operator.index(x) if not isinstance(x, bool) else None
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


def dropout(x: Any) -> float:
    """`dropout_p`: a number in [0, 1)."""
    value = number("dropout_p", x)
    if not 0 <= value < 1:
        raise ValueError(f"dropout_p={value} must lie in [0, 1).")
    return value


def broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    if len(shape) > len(target):
        return False
    # A list and a plain zip: torch.compile traces neither a generator nor `strict` here.
    return all([x in (1, y) for x, y in zip(shape[::-1], target[::-1])])


Shape = tuple[int, ...]


def token_shapes(query: Shape, key: Shape, value: Shape | None, enable_gqa: bool) -> None:
    """ValueError unless `(..., H, L, E)`, `(..., Hk, S, E)` and `(..., Hk, S, Ev)` belong together."""
    given = {"query": query, "key": key} | ({} if value is None else {"value": value})
    for name, shape in given.items():
        if len(shape) < 3:
            raise ValueError(f"{name} has shape {shape}; (..., heads, tokens, features) is needed: use {name}[None].")
        if shape[:-3] != query[:-3]:
            raise ValueError(f"{name} has batch shape {shape[:-3]} but query has {query[:-3]}; expand them to one.")
    if query[-1] == 0:
        raise ValueError(f"query has shape {query}: at least one feature is needed.")
    if key[-1] != query[-1]:
        raise ValueError(f"key has {key[-1]} features but query has {query[-1]}; they must agree.")
    if value is not None and value[-3:-1] != key[-3:-1]:
        raise ValueError(f"value has (heads, tokens) {value[-3:-1]} but key has {key[-3:-1]}; they must agree.")
    heads, key_heads = query[-3], key[-3]
    if heads == 0:
        raise ValueError(f"query has shape {query}: at least one head is needed.")
    if heads != key_heads and not enable_gqa:
        raise ValueError(f"query has {heads} heads but key has {key_heads}; pass enable_gqa=True for grouped queries.")
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"enable_gqa needs query heads ({heads}) to be a multiple of key heads ({key_heads}).")


def score_mask(mask: Array, shape: Shape, dtypes: tuple[Any, ...]) -> Array:
    """A mask that broadcasts to the scores' `shape` as a 4-D one that broadcasts to [N, H, L, S]; copied only if it
    broadcasts over some of several batch dimensions but not all."""
    if mask.dtype not in dtypes:
        raise TypeError(
            f"attn_mask has dtype {mask.dtype}; use bool (True = keep) or a float mask added to the scores."
        )
    if not broadcasts(mask.shape, shape):
        raise ValueError(f"attn_mask has shape {tuple(mask.shape)}, which does not broadcast to {shape}.")
    mask = mask.reshape(*(1,) * (len(shape) - mask.ndim), *mask.shape)
    batch, own = shape[:-3], mask.shape[-3:]
    if math.prod(mask.shape[:-3]) == 1:
        return mask.reshape(1, *own)
    return namespace(mask).broadcast_to(mask, (*batch, *own)).reshape(math.prod(batch), *own)


def potential_pair(given: Any) -> list[tuple[str, Any]]:
    """The two of `initial_potentials`, with their names."""
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(
            f"initial_potentials must be a pair (row, column) as in SinkhornAux, got {type(given).__name__}."
        )
    pair = [(f"initial_potentials ({side})", x) for side, x in zip(("row", "column"), given)]
    for name, x in pair:
        if x is None:
            raise TypeError(f"{name} is None; pass both potentials, or initial_potentials=None.")
    return pair
