"""From the shards that a rank was given to its share of the problem.

The problem is prepared whole on every rank, from vectors gathered along the sequence (lengths, segments, masses,
centres, potentials) and from stand-ins for query and key, and then cut: counts of active tokens, windows, default
masses, balance and feasibility are those of the whole. Queries, keys, values and dense masks stay where they are.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn.distributed import agreement, context
from torch_sinkhorn_attn.distributed.agreement import ABSENT, Agreed
from torch_sinkhorn_attn.distributed.columns import Span, blocks, columns_of
from torch_sinkhorn_attn.distributed.tiles import Share
from torch_sinkhorn_attn.distributed.wire import Wire
from torch_sinkhorn_attn.dustbin import Dustbin
from torch_sinkhorn_attn.problem import data_checks
from torch_sinkhorn_attn.problem.argument_checks import dustbin_tensors, options, score_mask
from torch_sinkhorn_attn.problem.arguments import Keywords, Prepared, canonical_tokens, prepare, without_inactive
from torch_sinkhorn_attn.problem.looking import data_checks_enabled
from torch_sinkhorn_attn.problem.masks.dense import DenseMask
from torch_sinkhorn_attn.problem.masks.lines import Lines, MaskScan, without_hulls
from torch_sinkhorn_attn.problem.masks.scan import Extremes
from torch_sinkhorn_attn.problem.problem import Inputs, Intervals, Marginals, Problem
from torch_sinkhorn_attn.problem.segments import Components, components, segments
from torch_sinkhorn_attn.problem.support import Support

_ALONG = {  # vectors along the sequence, and whether along the queries
    "query_segment_ids": True, "key_segment_ids": False, "window_centers": True, "row_mass": True, "col_mass": False,
}  # fmt: skip
_OF_DUSTBIN = {"row_score": True, "col_score": False, "row_capacity": True, "col_capacity": False}
ENGINES = (None, "tiled")


class Sharded(NamedTuple):
    """A call on one rank."""

    prepared: Prepared  # with the shards as inputs, the share's problem, and the whole's existence and scale
    share: Share


class _Local(NamedTuple):
    """What a rank can tell by itself."""

    query: Tensor  # as `canonical_tokens` gives them: (..., H, l, E), (..., Hk, s, E), (..., Hk, s, Ev)
    key: Tensor
    value: Tensor | None
    mask: Tensor | None
    keywords: dict[str, Any]
    headless: bool
    dustbin: tuple[Tensor | None, ...]  # the last four fields of Inputs
    scale: float


def prepare_shard(
    wire: Wire, query: Tensor, key: Tensor | None, value: Tensor | None, mask: Tensor | None, keywords: Keywords
) -> Sharded:
    """Compare the call with those of the other ranks, prepare the whole problem, and cut this rank's share."""
    found, error = None, None
    with context.sequence_parallel(None):
        try:
            found = _local(query, key, value, mask, dict(keywords))
        except (TypeError, ValueError, NotImplementedError) as raised:
            error = raised
        agreed = _agree(wire, found, error, query.device if isinstance(query, Tensor) else torch.device("cpu"))
        assert found is not None
        return _share(wire, found, agreed)


def _local(query: Any, key: Any, value: Any, mask: Any, keywords: dict[str, Any]) -> _Local:
    if keywords.get("engine") not in ENGINES:
        raise ValueError(
            f"engine={keywords['engine']!r} gives no half-steps that ranks could share; leave engine=None, which takes "
            "the tiles of plain PyTorch on any device."
        )
    if key is None:
        raise ValueError(
            "key is None: scores given in place of query and key are not sharded; pass zeros for query and key, and "
            "the scores, local rows by all keys, as a float attn_mask with mask_floor=None."
        )
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor, got {type(mask).__name__}.")
    if isinstance(mask, Tensor) and type(mask) not in (Tensor, torch.nn.Parameter):
        raise TypeError(f"attn_mask is a {type(mask).__name__}; pass a plain tensor, local rows by all keys.")
    query, key, value, mask, _, given, headless = canonical_tokens(query, key, value, mask, keywords)  # type: ignore[arg-type]
    checked, batch = options(given), query.shape[:-3]
    dustbin = given.get("dustbin")
    if dustbin is not None and not isinstance(dustbin, Dustbin):
        raise TypeError(f"dustbin must be a Dustbin or None, got {dustbin!r}; pass Dustbin(row_score, col_score).")
    bins = dustbin_tensors(dustbin, batch, query.shape[-3], query.shape[-2], key.shape[-2], value, query)
    if data_checks_enabled(query):
        data_checks.check_dustbin_scores(dustbin)
    for name in (*_ALONG, "query_lengths", "key_lengths"):
        x = given.get(name)
        if x is not None and not (isinstance(x, Tensor) and x.ndim >= (name in _ALONG)):
            raise TypeError(f"{name} must be a tensor, got {x!r}.")
    scale = 1 / math.sqrt(query.shape[-1]) if checked.scale is None else checked.scale
    return _Local(query, key, value, mask, dict(given), headless, bins, scale)


def _agree(wire: Wire, local: _Local | None, error: Exception | None, device: torch.device) -> Agreed:
    names = [*_ALONG, *_OF_DUSTBIN, "attn_mask", "initial_row", "initial_col"]
    if local is None:
        return agreement.agree(wire, {}, (0, 0), dict.fromkeys(names, ABSENT), error, device)
    rows, cols = local.query.shape[-2], local.key.shape[-2]
    along, description = _along(local), {}
    layouts = dict.fromkeys(names, ABSENT)
    for name, (x, of_rows) in along.items():
        layouts[name] = agreement.layout(x.shape[-1], rows if of_rows else cols)
    dims = {name: _kind(x, -1) for name, (x, _) in along.items()}
    if local.mask is not None:
        wide = local.mask.reshape((*(1,) * (2 - local.mask.ndim), *local.mask.shape))
        layouts["attn_mask"] = agreement.layout(wide.shape[-2], rows)
        dims["attn_mask"] = f"{_kind(wide, -2)} by {wide.shape[-1]} keys"
    tokens = {"query": local.query, "key": local.key} | ({} if local.value is None else {"value": local.value})
    dims |= {name: _kind(x, -2) for name, x in tokens.items()}
    for name, x in local.keywords.items():
        if name == "initial_potentials" and isinstance(x, (tuple, list)):
            for side, y, n in zip(("initial_row", "initial_col"), x, (rows, cols), strict=False):
                description[side] = (
                    f"{_kind(y, -1)} and {y.shape[-1] - n} dustbins" if isinstance(y, Tensor) else repr(y)
                )
        elif name == "dustbin" and x is not None:
            for part, y in vars(x).items():
                description[f"dustbin.{part}"] = dims.get(part) or (
                    _kind(y, None) if isinstance(y, Tensor) else repr(y)
                )
        elif isinstance(x, Tensor):
            description[name] = dims.get(name) or _kind(x, None)
        elif x is not None:
            description[name] = repr(x)
    description |= {name: dims[name] for name in (*tokens, "attn_mask") if name in dims}
    description["gradients"] = str(torch.is_grad_enabled())
    return agreement.agree(wire, description, (rows, cols), layouts, error, device)


def _kind(x: Tensor, sharded_dim: int | None) -> str:
    shape = [str(n) for n in x.shape]
    if sharded_dim is not None and shape:
        shape[sharded_dim] = "tokens"
    return f"{str(x.dtype).removeprefix('torch.')}[{', '.join(shape)}]{' with grad' if x.requires_grad else ''}"


def _along(local: _Local) -> dict[str, tuple[Tensor, bool]]:
    """The vectors along the sequence, and whether along the queries."""
    given, dustbin = local.keywords, local.keywords.get("dustbin")
    found = {name: (given[name], rows) for name, rows in _ALONG.items() if isinstance(given.get(name), Tensor)}
    for name, rows in _OF_DUSTBIN.items():
        x = getattr(dustbin, name, None)
        if isinstance(x, Tensor) and x.ndim:
            found[name] = x, rows
    return found


def _share(wire: Wire, local: _Local, agreed: Agreed) -> Sharded:
    batch, heads, key_heads = local.query.shape[:-3], local.query.shape[-3], local.key.shape[-3]
    length, size = sum(agreed.rows), sum(agreed.cols)
    keywords, capacities = _gathered(wire, local, agreed)
    zero = local.query.detach().new_zeros(())
    alike = local.mask is None and not any(isinstance(x, Tensor) for x in (*keywords.values(), *capacities.values()))
    if alike and keywords.get("initial_potentials") is None:  # one problem stands for all, in vectors of its own size
        batch_of, heads_of = torch.Size([1]), (1, 1)
    else:
        batch_of, heads_of = batch, (heads, key_heads)
    query, key = (zero.expand(*batch_of, h, n, 1) for h, n in zip(heads_of, (length, size), strict=True))
    own, whole, reader = _mask(wire, local, agreed, (*batch, heads, length, size))
    if local.keywords.get("dustbin") is not None:
        keywords["dustbin"] = Dustbin(0.0, 0.0, **capacities)
    keywords |= {"scale": local.scale, "engine": None}
    prepared = prepare(query, key, None, whole, mask_reader=reader, **keywords)
    rows, cols = blocks(agreed.rows)[wire.rank], blocks(agreed.cols)[wire.rank]
    tokens = local.query, local.key, local.value
    flat = [None if x is None else x.reshape(math.prod(batch), *x.shape[len(batch) :]) for x in tokens]
    if prepared.active is not None:
        flat = _without_inactive(flat, prepared, rows, cols)
    seed = prepared.problem.dropout_seed
    if seed is not None:
        prepared = prepared._replace(problem=replace(prepared.problem, dropout_seed=wire.stacked(seed)[0]))
    share = _cut(wire, prepared.problem, agreed, (math.prod(batch), heads))
    inputs = Inputs(*flat, own, *local.dustbin)  # type: ignore[arg-type, call-arg]
    prepared = prepared._replace(inputs=inputs, problem=share.problem, headless=local.headless, active=None)
    return Sharded(prepared._replace(batch=batch, dtype=local.query.dtype), share)


def _gathered(wire: Wire, local: _Local, agreed: Agreed) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keywords and the dustbin's capacities, of the whole sequence."""
    keywords, dustbin = dict(local.keywords), local.keywords.get("dustbin")
    along = {}
    for name, (x, of_rows) in _along(local).items():
        if name in ("row_score", "col_score"):
            continue
        counts = agreed.rows if of_rows else agreed.cols
        along[name] = wire.gathered(x, counts, -1) if agreed.sharded[name] else x
    keywords |= {name: x for name, x in along.items() if name in _ALONG}
    capacities = {name: along.get(name, getattr(dustbin, name, None)) for name in ("row_capacity", "col_capacity")}
    initial = keywords.get("initial_potentials")
    if isinstance(initial, (tuple, list)) and len(initial) == 2 and all(isinstance(x, Tensor) for x in initial):
        keywords["initial_potentials"] = tuple(
            _whole_potential(wire, x, counts) for x, counts in zip(initial, (agreed.rows, agreed.cols), strict=True)
        )
    return keywords, capacities


def _whole_potential(wire: Wire, x: Tensor, counts: list[int]) -> Tensor:
    own = counts[wire.rank]
    return torch.cat([wire.gathered(x[..., :own], counts, -1), x[..., own:]], -1)


def _mask(
    wire: Wire, local: _Local, agreed: Agreed, shape: tuple[int, ...]
) -> tuple[Tensor | None, Tensor | None, Any]:
    """The mask of the rank's rows `[.., l or 1, S or 1]`; the whole mask, of one row or column; or the reader of one
    that nobody has whole."""
    if local.mask is None:
        return None, None, None
    mask, rows = local.mask, agreed.sharded["attn_mask"]
    if mask.ndim and mask.shape[-1] not in (1, shape[-1]):
        raise ValueError(
            f"attn_mask has {mask.shape[-1]} columns on rank {wire.rank}; local rows by all {shape[-1]} keys are "
            f"needed "
            "(or one column). Padding and packing are said without a mask: by lengths, or by segment ids, in shards."
        )
    local_shape = (*shape[:-2], agreed.rows[wire.rank] if rows else 1, shape[-1])
    own = score_mask(mask, local_shape, local.query)
    assert own is not None
    if not rows or mask.ndim < 2:
        return own, mask, None
    if mask.shape[-1] == 1:
        return own, wire.gathered(mask, agreed.rows, -2), None
    return own, None, _MaskReader(wire, own.detach(), agreed)


class _MaskReader:
    """Scans a mask of which each rank has its rows."""

    def __init__(self, wire: Wire, mask: Tensor, agreed: Agreed):
        self.wire, self.mask, self.agreed = wire, mask, agreed

    def __call__(
        self, support: Support, packed: bool, dtype: torch.dtype, floor: float | None, softmax_mode: bool
    ) -> MaskScan:
        wire, mask, (start, end) = self.wire, self.mask, blocks(self.agreed.rows)[self.wire.rank]
        whole = Lines.of(support, packed)
        rows = {name: getattr(support, name)[:, start:end] for name in Support._fields if name.startswith("row")}
        lines = Lines.of(support._replace(**rows), packed)._replace(groups=whole.groups)
        reader, limit = _SharedMask(mask, lines, dtype), None
        reader.wire = wire
        floats = mask.dtype != torch.bool
        if floats and floor is not None:
            level = wire.maximum(reader.level().nan_to_num(math.nan, math.inf, -math.inf))
            limit = torch.where(level.isfinite(), level + floor, -torch.inf)
        found = reader.scan(limit, hulls=False)
        if floats and data_checks_enabled(mask):
            high, low = _SharedMask(mask, lines.among(found.row_active, found.col_active), dtype).extremes()
            ends = wire.maximum(torch.stack([high.nan_to_num(math.inf, math.inf, -math.inf), -low.nan_to_num(0.0)]))
            data_checks.check_mask(Extremes(ends[0], -ends[1]), dtype, softmax_mode)
        rows_active = wire.gathered(found.row_active.to(torch.uint8), self.agreed.rows, -1) > 0
        return without_hulls(rows_active, found.col_active)


class _SharedMask(DenseMask):
    wire: Wire

    def level(self) -> Tensor:
        if self.lines.length:
            return super().level()
        return self.mask.new_full((self.num, self.heads, self.lines.groups), -torch.inf, dtype=self.dtype)

    def across(self, marked: Tensor) -> Tensor:
        return self.wire.maximum(marked.to(torch.uint8)) > 0


def _without_inactive(flat: list[Tensor | None], prepared: Prepared, rows: Span, cols: Span) -> list[Tensor | None]:
    """As `without_inactive`, deciding by all tokens whether grouped keys need a copy for each head."""
    assert prepared.active is not None and flat[0] is not None and flat[1] is not None
    row_active, col_active, by_head = prepared.active
    group = flat[0].shape[1] // flat[1].shape[1]
    if by_head and group > 1:
        by_head = not torch.equal(col_active[:, ::group].repeat_interleave(group, 1), col_active)
    here = row_active[..., slice(*rows)], col_active[..., slice(*cols)]
    return without_inactive(flat, *here, by_head, look=False)


def _cut(wire: Wire, problem: Problem, agreed: Agreed, heads: tuple[int, int]) -> Share:
    """A rank's rows of the whole problem, and the columns it holds, for (N, H) `heads`."""
    support, marginals = problem.support, problem.marginals
    start, end = blocks(agreed.rows)[wire.rank]
    reached, intervals = None, None
    if problem.outline.banded:
        lo, hi = support.row_lo.cpu(), support.row_hi.cpu()
        reached = [_reach(lo[:, a:b], hi[:, a:b]) for a, b in blocks(agreed.rows)]
        intervals = lo[:, start:end], hi[:, start:end]
    columns = columns_of(wire, agreed.cols, reached)
    rows, cols = slice(start, end), slice(columns.start, columns.end)
    if intervals is not None:
        intervals = _shifted(*intervals, columns.start)
    lo, hi = _shifted(support.row_lo[:, rows], support.row_hi[:, rows], columns.start)
    first, last = (x[:, cols] for x in (support.col_lo, support.col_hi))

    def part(x: Tensor | None, lines: slice, count: int) -> Tensor | None:
        """Of labels, masses or potentials with the dustbins' behind."""
        if x is None:
            return None
        return torch.cat([x[..., lines], x[..., count:]], -1) if x.shape[-1] > count else x[..., lines]

    length, size = sum(agreed.rows), sum(agreed.cols)
    log_a, log_b = part(marginals.log_row_mass, rows, length), part(marginals.log_col_mass, cols, size)
    segment = part(support.row_segment, rows, length), part(support.col_segment, cols, size)
    of_tokens = (None if x is None else x.expand(heads[0], -1) for x in (lo, hi, first, last, *segment))
    masses = (log_a, log_b, marginals.log_row_capacity, marginals.log_col_capacity)
    own = Problem(
        Intervals(*of_tokens),  # type: ignore[arg-type]
        Marginals(*(None if x is None else x.expand(*heads, -1) for x in masses)),  # type: ignore[arg-type]
        part(problem.initial_row, rows, length),
        part(problem.initial_col, cols, size),
        problem.dropout_seed,
        problem.solver,
        replace(problem.outline, uniform=False),
    )

    def lines(whole: Components) -> Components:
        row, col = part(whole.row, rows, length), part(whole.col, cols, size)
        return Components(row, col, whole.number)

    return Share(own, wire, columns, start, lines(segments(problem)), lines(_few(components(problem))), intervals)


def _few(parts: Components) -> Components:
    """With as many numbers as there are parts, where that may be looked at: they go over the wire."""
    if parts.row is None or parts.col is None or parts.number == 1:
        return parts
    number = 1 + max(int(x.max()) if x.numel() else 0 for x in (parts.row, parts.col))
    return Components(None, None, 1) if number == 1 else parts._replace(number=number)


def _shifted(lo: Tensor, hi: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Intervals counted from another column; (0, 0) where empty."""
    some = lo < hi
    return torch.where(some, lo - start, 0), torch.where(some, hi - start, 0)


def _reach(lo: Tensor, hi: Tensor) -> Span:
    if lo.numel() == 0:
        return 0, 0
    some = lo < hi
    return int(torch.where(some, lo, torch.iinfo(lo.dtype).max).min().clamp(max=int(hi.max()))), int(hi.max())
