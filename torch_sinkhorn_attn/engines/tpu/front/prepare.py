"""User arguments in, `Inputs`, `Constants` and `Statics` out: what
`torch_sinkhorn_attn.problem.arguments` is for tensors."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from torch_sinkhorn_attn.engines.tpu.front.checks import (
    flattened,
    is_array,
    not_traced,
    positions,
    score_mask,
    tokens,
)
from torch_sinkhorn_attn.engines.tpu.front.mask_scan import active_tokens
from torch_sinkhorn_attn.engines.tpu.front.scores import as_mask, tokens_of
from torch_sinkhorn_attn.engines.tpu.front.shards import (
    Outline,
    banded,
    extremes,
    of_held,
    sequence_of,
    support_of_shard,
)
from torch_sinkhorn_attn.engines.tpu.front.support import build_support, token_ids
from torch_sinkhorn_attn.engines.tpu.method.problem import Constants, Inputs, Statics, compute_dtype
from torch_sinkhorn_attn.options import CHECKS, Options, number, positive
from torch_sinkhorn_attn.problem import shapes
from torch_sinkhorn_attn.problem.causal import causal_window
from torch_sinkhorn_attn.problem.mass_scale import MassScale, find_scale, in_units
from torch_sinkhorn_attn.problem.masses import Pair, Side, dustbin_capacities, marginal_masses


class Dustbin(NamedTuple):
    """Scores, capacities and value of the dustbin; gradients flow to the scores and the value.

    row_score, col_score: of leaving a query or a key unmatched, numbers or arrays broadcasting to `(..., H, L)` and
        `(..., H, S)`, per head `(H, 1)`; in score units, as `scale * q.k`.
    corner_score: number, or array broadcasting to `(..., H)`.
    row_capacity, col_capacity: positive masses of the dustbin row and column, likewise, constant within each problem.
        Default: the other side's total active mass, or what balance leaves if the other one is given.
    value: array broadcasting to `(..., H, Ev)` that mass sent to the dustbin reads; zero by default.
    """

    row_score: Array | float
    col_score: Array | float
    corner_score: Array | float = 0.0
    row_capacity: Array | float | None = None
    col_capacity: Array | float | None = None
    value: Array | None = None


class Prepared(NamedTuple):
    inputs: Inputs
    constants: Constants
    statics: Statics
    batch: tuple[int, ...]  # the user's leading dimensions, flattened to N
    scale: MassScale | None  # of the problem's masses, None where they are the user's


def prepare(query: Any, key: Any, value: Any, attn_mask: Any, **options: Any) -> Prepared:
    """Check by type and shape, and canonicalise; `options` are those of `sinkhorn_attention`, all of them."""
    products, axis = None, options["sequence_axis"]
    if key is None and axis is not None:
        raise ValueError(
            "key=None is not taken with sequence_axis: scores of local queries and all keys go as a float attn_mask, "
            "beside a query and a key of zeros."
        )
    if key is None:
        products = query
        query, key = tokens_of(query, value, options["enable_gqa"])
    query, key, value = tokens(query, key, value, options["enable_gqa"])
    batch, (heads, length, features), size = query.shape[:-3], query.shape[-3:], key.shape[-2]
    num, dtype, dustbin = math.prod(batch), compute_dtype(query), options["dustbin"]
    numbers = {name: x for name, x in options.items() if name in CHECKS}
    not_traced(**numbers)
    o = Options.of(numbers)
    solver = o.solver(features, str(dtype))
    if dustbin is not None and not isinstance(dustbin, Dustbin):
        raise TypeError(f"dustbin must be a Dustbin or None, got {dustbin!r}; pass Dustbin(row_score, col_score).")

    def integers(name: str, *rest: int) -> Array | None:
        return flattened(name, options[name], "integer", batch, rest)

    segments = integers("query_segment_ids", length), integers("key_segment_ids", size)
    if (segments[0] is None) != (segments[1] is None):
        raise ValueError(
            "query_segment_ids and key_segment_ids belong together: pass both (the same array in self-attention)."
        )
    sequence = None if axis is None else sequence_of(axis, length, size)
    keys = size if sequence is None else sequence.size * size  # of all devices
    least = min(length, size) if sequence is None else sequence.groups
    centers = positions("window_centers", options["window_centers"], batch, length)
    lengths = integers("query_lengths"), integers("key_lengths")
    packed = segments[0] is not None
    bins = 0 if dustbin is None else (max(1, least) if packed else 1)
    mask = score_mask(attn_mask, batch, (heads, length, keys))
    masses = tuple(
        flattened(name, options[name], "floating-point", batch, (heads, n))
        for name, n in (("row_mass", length), ("col_mass", size))
    )
    initial = _initial(options["initial_potentials"], batch, (heads, length + bins), (heads, size + bins), dtype)
    scores, given = _dustbin(dustbin, batch, heads, length, size, value.shape[-1], dtype)

    first = (0, 0) if sequence is None else (sequence.first_row, sequence.place * size)
    ids = [
        token_ids(num, n, count, segment, start)
        for n, count, segment, start in zip((length, size), lengths, segments, first, strict=True)
    ]
    whole = not packed and lengths == (None, None)
    uniform = solver.balanced and dustbin is None and masses == (None, None)
    softmax_mode = uniform and o.base_iters == o.tail_iters == 0
    shards = 1 if sequence is None else sequence.size
    window, causal = causal_window(o, attn_mask, shards * length, keys, whole, uniform, centers is not None)
    if sequence is None:
        support = build_support(ids[0], ids[1], window, packed, causal, centers)
    else:
        same = _same_on_both_sides(options) and length == size
        aligned = (whole or same) and not causal and centers is None
        sequence = banded(sequence, Outline(window, aligned, not packed and mask is None))
        support = support_of_shard(sequence, ids, window, packed, causal, centers, whole=mask is not None)
    row_active, col_active = support.row_active[:, None], support.col_active[:, None]
    low = None if softmax_mode else o.mask_floor
    if products is not None:
        products = jnp.asarray(products).reshape(num, heads, length, size)
        mask, low = as_mask(products, mask, support, packed, o, low), None
    if mask is not None and sequence is None:
        row_active, col_active = active_tokens(lax.stop_gradient(mask), support, packed, dtype, low)
    elif mask is not None and sequence is not None:
        over = sequence.highest, sequence.size * length
        row_active, col_active = active_tokens(lax.stop_gradient(mask), support, packed, dtype, low, *over)
        col_active = jnp.broadcast_to(col_active, (*col_active.shape[:2], keys))
        col_active = lax.dynamic_slice_in_dim(col_active, sequence.place * size, size, -1)
        support = of_held(sequence, support)
    row_active = jnp.broadcast_to(row_active, (num, heads, length))
    col_active = jnp.broadcast_to(col_active, (num, heads, size))
    row_segment, col_segment = (support.row_segment, support.col_segment) if packed else (None, None)
    groups = max(1, least) if packed else 1
    rows = Side(masses[0], row_active, row_segment, sequence)
    cols = Side(masses[1], col_active, col_segment, sequence)
    a, b = marginal_masses(rows, cols, groups, dustbin is not None, dtype)
    capacities = dustbin_capacities(given, a, b, rows, cols, bins)
    scale = None
    if solver.balanced and any(x is not None for x in (*masses, *given)):
        every = [lax.stop_gradient(x) for x in (a, b, *capacities) if x is not None]
        every = every if sequence is None else [extremes(sequence, x) for x in every]
        scale = find_scale(every, (1.0, 1.0), half_steps=o.base_iters + o.tail_iters > 0, look=False, dtype=dtype)
    if scale is not None:
        a, b = in_units(scale, a), in_units(scale, b)
        row, col = (None if x is None else in_units(scale, x) for x in capacities)
        capacities = row, col
        if initial[0] is not None:  # a start from 0 does not depend on the unit
            initial = scale.shifted(*initial, back=True)

    left, right = window or (-1, -1)
    has_intervals = packed or window is not None or causal
    aligned = whole and not causal and centers is None and sequence is None
    statics = Statics.of(
        solver, banded=has_intervals, window_left=left, window_right=right, uniform=aligned, sequence=sequence
    )
    log_b = jnp.log(b)
    if sequence is not None:  # of the held
        log_b = sequence.held(log_b, fill=-jnp.inf)
        col_segment = None if col_segment is None else sequence.held(col_segment)
        if initial[1] is not None:
            initial = initial[0], jnp.concatenate([sequence.held(initial[1][..., :size]), initial[1][..., size:]], -1)
    log_capacities = [None if x is None else jnp.log(x) for x in capacities]
    constants = Constants(
        row_lo=support.row_lo, row_hi=support.row_hi, col_lo=support.col_lo, col_hi=support.col_hi,
        log_row_mass=jnp.log(a), log_col_mass=log_b, row_segment=row_segment, col_segment=col_segment,
        log_row_capacity=log_capacities[0], log_col_capacity=log_capacities[1],
        initial_row=initial[0], initial_col=initial[1], dropout_seed=_seed(options["dropout_seed"], o.dropout_p),
    )  # fmt: skip
    flat = [x.reshape(num, *x.shape[len(batch) :]) for x in (query, key, value)]
    if mask is not None or not statics.uniform:
        by_head = mask is not None and mask.shape[1] > 1
        flat = _without_inactive(flat, row_active, col_active, by_head)
    return Prepared(Inputs._make((*flat, mask, *scores)), lax.stop_gradient(constants), statics, batch, scale)


def _same_on_both_sides(options: dict[str, Any]) -> bool:
    """Whether queries and keys have one array of lengths, and one of segments."""
    pairs = ("query_lengths", "key_lengths"), ("query_segment_ids", "key_segment_ids")
    return all(options[one] is options[other] for one, other in pairs)


def _without_inactive(tensors: list[Array], row_active: Array, col_active: Array, by_head: bool) -> list[Array]:
    """Zeros in place of inactive tokens, whose NaN would spread through 0 * NaN. Where a mask may make a key inactive
    for some of the query heads that read it alone (`by_head`), each head gets its own copy."""
    query, key, value = tensors
    group = query.shape[1] // key.shape[1]
    if by_head and group > 1:
        key, value = jnp.repeat(key, group, 1), jnp.repeat(value, group, 1)
    elif group > 1:
        col_active = col_active[:, ::group]
    return [
        jnp.where(row_active[..., None], query, 0),
        jnp.where(col_active[..., None], key, 0),
        jnp.where(col_active[..., None], value, 0),
    ]


def _initial(
    given: Any, batch: tuple[int, ...], rows: tuple[int, int], cols: tuple[int, int], dtype: jnp.dtype
) -> Pair:
    if given is None:
        return None, None
    pair = []
    for (name, x), shape in zip(shapes.potential_pair(given), (rows, cols), strict=True):
        x = flattened(name, x, "floating-point", batch, shape)
        assert x is not None
        pair.append(x.astype(dtype))
    return pair[0], pair[1]


def _dustbin(
    dustbin: Dustbin | None, batch: tuple[int, ...], heads: int, length: int, size: int, width: int, dtype: jnp.dtype
) -> tuple[tuple[Array | None, ...], Pair]:
    """(row_score, col_score, corner_score, value) of `Inputs`, differentiable, and the capacities given."""
    if dustbin is None:
        return (None,) * 4, (None, None)
    found: dict[str, Array | None] = {}
    shapes = {
        "row_score": (heads, length), "col_score": (heads, size), "corner_score": (heads,), "value": (heads, width),
        "row_capacity": (heads, length), "col_capacity": (heads, size),
    }  # fmt: skip
    for name, shape in shapes.items():
        x = getattr(dustbin, name)
        if x is not None and not is_array(x) and name != "value":
            not_traced(**{f"Dustbin {name}": x})
            x = jnp.asarray((positive if "capacity" in name else number)(f"Dustbin {name}", x), dtype)
        elif x is None and not ("capacity" in name or name == "value"):
            raise TypeError(f"Dustbin {name} must be a number or an array, got None.")
        x = flattened(f"Dustbin {name}", x, "floating-point", batch, shape)
        found[name] = None if x is None else x.astype(dtype)
    scores = tuple(found[name] for name in ("row_score", "col_score", "corner_score", "value"))
    return scores, (found["row_capacity"], found["col_capacity"])


def _seed(seed: Any, dropout_p: float) -> Array | None:
    """Two 32-bit words, from a PRNG key or `[2]` uint32."""
    if dropout_p == 0:
        return None
    if seed is None:
        raise ValueError(f"dropout_p={dropout_p} needs dropout_seed: pass a jax.random.key, another in every step.")
    if not is_array(seed):
        raise TypeError(f"dropout_seed must be a jax.random.key or an array [2] of uint32, got {type(seed).__name__}.")
    if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key) and seed.shape == ():
        return jax.random.bits(seed, (2,), jnp.uint32)
    if seed.dtype != jnp.uint32 or seed.shape != (2,):
        raise ValueError(f"dropout_seed is {seed.dtype}{list(seed.shape)}; a jax.random.key or uint32[2] is needed.")
    return jnp.asarray(seed)
