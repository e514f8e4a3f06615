"""From the shards that a rank was given to its share of the problem.

The problem is prepared whole on every rank, from vectors gathered along the sequence (lengths, segments, masses,
centres, potentials) and from stand-ins for query and key, and then cut: counts of active tokens, windows, default
masses, balance and feasibility are those of the whole. Queries, keys, values, scores and dense masks stay where they
are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn.distributed import agreement, context
from torch_sinkhorn_attn.distributed.agreement import Agreed, Along
from torch_sinkhorn_attn.distributed.columns import Span, blocks
from torch_sinkhorn_attn.distributed.cut import share_of
from torch_sinkhorn_attn.distributed.masks import MaskReader, ScoresReader, own_mask
from torch_sinkhorn_attn.distributed.share import Share
from torch_sinkhorn_attn.distributed.wire import Wire
from torch_sinkhorn_attn.dustbin import Dustbin
from torch_sinkhorn_attn.engines import ENGINES, engine_of, missing
from torch_sinkhorn_attn.engines.base import Engine
from torch_sinkhorn_attn.engines.tiled import engine as tiled
from torch_sinkhorn_attn.problem import data_checks
from torch_sinkhorn_attn.problem.argument_checks import dustbin_tensors, options, score_mask
from torch_sinkhorn_attn.problem.arguments import Keywords, Prepared, canonical_tokens, prepare, without_inactive
from torch_sinkhorn_attn.problem.looking import data_checks_enabled
from torch_sinkhorn_attn.problem.problem import Inputs, Problem

_ALONG = {  # vectors along the sequence, and whether along the queries
    "query_segment_ids": True, "key_segment_ids": False, "window_centers": True, "row_mass": True, "col_mass": False,
}  # fmt: skip
_OF_DUSTBIN = {"row_score": True, "col_score": False, "row_capacity": True, "col_capacity": False}


class Call(NamedTuple):
    """What a rank was called with: its shards, without DTensors, and the function's own arguments in words."""

    function: str
    query: Tensor
    key: Tensor | None
    value: Tensor | None
    mask: Tensor | None
    keywords: Keywords
    check: Callable[[], object] | None = None  # of further arguments, whose errors the other ranks are told too
    width: int | None = None  # features of a value that comes later


class Sharded(NamedTuple):
    """A call on one rank."""

    prepared: Prepared  # with the shards as inputs, the share's problem, and the whole's existence and scale
    share: Share
    whole: Problem  # in vectors; of one batch element and head where all are alike, unless `each` was asked for


class _Local(NamedTuple):
    """What a rank can tell by itself."""

    query: Tensor  # as `canonical_tokens` gives them: (..., H, l, E), (..., Hk, s, E), (..., Hk, s, Ev)
    key: Tensor  # of all keys where nothing tells which are here
    value: Tensor | None
    mask: Tensor | None
    scores: Tensor | None  # (..., H, l, S)
    keywords: dict[str, Any]
    headless: bool
    dtype: torch.dtype  # of the result
    dustbin: tuple[Tensor | None, ...] | None  # the last four of Inputs; None until it is known which keys are here
    scale: float
    width: int | None

    @property
    def cols(self) -> int | None:
        """How many keys are here, where that is known."""
        return None if self.scores is not None and self.value is None else self.key.shape[-2]


def prepare_shard(wire: Wire, call: Call, each: bool = False) -> Sharded:
    """Compare the call with those of the other ranks, prepare the whole problem, and cut this rank's share. `each`: the
    whole problem of every batch element and head, though all be alike."""
    found, error = None, None
    with context.sequence_parallel(None):
        try:
            found = _local(call)
        except (TypeError, ValueError, NotImplementedError) as raised:
            error = raised
        device = call.query.device if isinstance(call.query, Tensor) else torch.device("cpu")
        agreed = _agree(wire, call.function, found, error, device)
        assert found is not None
        return _share(wire, found, agreed, each)


def _local(call: Call) -> _Local:
    keywords, mask, value = dict(call.keywords), call.mask, call.value
    if call.check is not None:
        call.check()
    able = [tiled.ENGINE.name, *(name for name, engine in ENGINES.items() if engine.of_ranks)]
    if keywords.get("engine") not in (None, *able):
        raise ValueError(
            f"engine={keywords['engine']!r} gives no half-steps that ranks could share; choose one of "
            f"{', '.join(map(repr, able))}, or None for the one that fits the tensors."
        )
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor, got {type(mask).__name__}.")
    if isinstance(mask, Tensor) and type(mask) not in (Tensor, torch.nn.Parameter):
        raise TypeError(f"attn_mask is a {type(mask).__name__}; pass a plain tensor, local rows by all keys.")
    keys = value.shape[-2] if call.key is None and isinstance(value, Tensor) and value.ndim > 1 else None
    query, key, value, mask, scores, given, headless = canonical_tokens(
        call.query, call.key, value, mask, keywords, keys  # type: ignore[arg-type]
    )  # fmt: skip
    checked = options(given)
    dustbin = given.get("dustbin")
    if dustbin is not None and not isinstance(dustbin, Dustbin):
        raise TypeError(f"dustbin must be a Dustbin or None, got {dustbin!r}; pass Dustbin(row_score, col_score).")
    if data_checks_enabled(query):
        data_checks.check_dustbin_scores(dustbin)
    for name in (*_ALONG, "query_lengths", "key_lengths"):
        x = given.get(name)
        if x is not None and not (isinstance(x, Tensor) and x.ndim >= (name in _ALONG)):
            raise TypeError(f"{name} must be a tensor, got {x!r}.")
    scale = 1 / math.sqrt(query.shape[-1]) if checked.scale is None else checked.scale
    kind = query.dtype if scores is None or value is not None else scores.dtype
    local = _Local(query, key, value, mask, scores, dict(given), headless, kind, None, scale, call.width)
    return local if local.cols is None else local._replace(dustbin=_dustbin(local, local.cols))


def _dustbin(local: _Local, cols: int) -> tuple[Tensor | None, ...]:
    query, value = local.query, local.value
    if value is None and local.width is not None:
        value = query.new_empty(0).expand(local.width, 0).mT
    sizes = query.shape[:-3], query.shape[-3], query.shape[-2], cols
    return dustbin_tensors(local.keywords.get("dustbin"), *sizes, value, query)


def _agree(wire: Wire, function: str, local: _Local | None, error: Exception | None, device: torch.device) -> Agreed:
    along = {name: Along(None, rows) for name, rows in (*_ALONG.items(), *_OF_DUSTBIN.items(), ("attn_mask", True))}
    description = {"function": function}
    if local is None:
        return agreement.agree(wire, description, (0, 0), along, error, device)
    rows, cols = local.query.shape[-2], local.cols
    for name, (x, of_rows) in _along(local).items():
        along[name] = Along(x.shape[-1], of_rows)
    dims = {name: _kind(x, -1) for name, (x, _) in _along(local).items()}
    if local.mask is not None:
        wide = local.mask.reshape((*(1,) * (2 - local.mask.ndim), *local.mask.shape))
        along["attn_mask"] = Along(wide.shape[-2], True)
        dims["attn_mask"] = f"{_kind(wide, -2)} by {wide.shape[-1]} keys"
    tokens = {"query": local.query, "key": local.key} | ({} if local.value is None else {"value": local.value})
    if local.scores is not None:
        tokens = {"scores": local.scores} | ({} if local.value is None else {"value": local.value})
    dims |= {name: _kind(x, -2) for name, x in tokens.items()}
    for name, x in local.keywords.items():
        if name == "initial_potentials" and isinstance(x, (tuple, list)):
            for side, y, n in zip(("initial_row", "initial_col"), x, (rows, cols), strict=False):
                bins = f" and {y.shape[-1] - n} dustbins" if isinstance(y, Tensor) and n is not None else ""
                description[side] = f"{_kind(y, -1)}{bins}" if isinstance(y, Tensor) else repr(y)
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
    own = _asked(local.keywords.get("engine"), device)
    description["kernels"] = own.name if own.of_ranks else tiled.ENGINE.name
    if own.of_ranks and own.rank_missing() is not None:
        description["kernels"] = f"missing (engine={own.name!r}; engine='tiled' on all ranks does without)"
    description["gradients"] = str(torch.is_grad_enabled())
    total = None if local.scores is None else local.scores.shape[-1]
    agreed = agreement.agree(wire, description, (rows, cols), along, error, device, total)
    if total is not None and sum(agreed.cols) != total:
        raise ValueError(
            f"query holds scores of {total} keys but the ranks have {agreed.cols} values: pass local rows by all keys."
        )
    return agreed


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


def _share(wire: Wire, local: _Local, agreed: Agreed, each: bool) -> Sharded:
    batch, heads, key_heads = local.query.shape[:-3], local.query.shape[-3], local.key.shape[-3]
    length, size = sum(agreed.rows), sum(agreed.cols)
    keywords, capacities = _gathered(wire, local, agreed)
    zero = local.query.detach().new_zeros(())
    alike = not any(isinstance(x, Tensor) for x in (local.mask, local.scores, *keywords.values(), *capacities.values()))
    if alike and not each and keywords.get("initial_potentials") is None:  # one stands for all, in vectors of its size
        batch_of, heads_of = torch.Size([1]), (1, 1)
    else:
        batch_of, heads_of = batch, (heads, key_heads)
    query, key = (zero.expand(*batch_of, h, n, 1) for h, n in zip(heads_of, (length, size), strict=True))
    own, whole, reader = _mask(wire, local, agreed, (*batch, heads, length, size))
    if local.keywords.get("dustbin") is not None:
        keywords["dustbin"] = Dustbin(0.0, 0.0, **capacities)
    keywords |= {"scale": local.scale, "engine": None}
    prepared = prepare(query, key, None, whole, mask_reader=reader, **keywords)
    if isinstance(reader, ScoresReader):
        own = reader.found
    rows, cols = blocks(agreed.rows)[wire.rank], blocks(agreed.cols)[wire.rank]
    tokens = local.query, local.key.narrow(-2, 0, cols[1] - cols[0]), local.value
    flat = [None if x is None else x.reshape(math.prod(batch), *x.shape[len(batch) :]) for x in tokens]
    if prepared.active is not None:
        flat = _without_inactive(flat, prepared, rows, cols)
    seed = prepared.problem.dropout_seed
    if seed is not None:
        prepared = prepared._replace(problem=replace(prepared.problem, dropout_seed=wire.stacked(seed)[0]))
    share = share_of(wire, prepared.problem, agreed, (math.prod(batch), heads))
    bins = _dustbin(local, cols[1] - cols[0]) if local.dustbin is None else local.dustbin
    inputs = Inputs(*flat, own, *bins)  # type: ignore[arg-type, call-arg]
    share = replace(share, chosen=_choice(local.keywords.get("engine"), inputs, share))
    found = prepared._replace(inputs=inputs, problem=share.problem, headless=local.headless, active=None)
    return Sharded(found._replace(batch=batch, dtype=local.dtype), share, prepared.problem)


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
) -> tuple[Tensor | None, Tensor | None, MaskReader | ScoresReader | None]:
    """The mask of the rank's rows; the whole mask, of one row or column; or the reader of one that nobody has whole."""
    if local.scores is not None:
        rows = local.scores.shape[-2:]
        mask = score_mask(local.mask, (*shape[:-2], *rows), local.query)
        scores = local.scores.reshape(math.prod(shape[:-3]), *shape[-3:-2], *rows)
        return None, None, ScoresReader(wire, scores, mask, agreed, options(local.keywords))
    own, whole = own_mask(wire, local.mask, local.query, agreed, shape)
    if own is None or whole is not None:
        return own, whole, None
    return own, None, MaskReader(wire, own, agreed)


def _without_inactive(flat: list[Tensor | None], prepared: Prepared, rows: Span, cols: Span) -> list[Tensor | None]:
    """As `without_inactive`, deciding by all tokens whether grouped keys need a copy for each head."""
    assert prepared.active is not None and flat[0] is not None and flat[1] is not None
    row_active, col_active, by_head = prepared.active
    group = flat[0].shape[1] // flat[1].shape[1]
    if by_head and group > 1:
        by_head = not torch.equal(col_active[:, ::group].repeat_interleave(group, 1), col_active)
    here = row_active[..., slice(*rows)], col_active[..., slice(*cols)]
    return without_inactive(flat, *here, by_head, look=False)


def _choice(name: str | None, inputs: Inputs, share: Share) -> Engine | None:
    """Who makes the half-steps of the rows here: the engine named, or the device's own where it can; None: tiles of
    plain PyTorch. All ranks have one dtype and one kind of device, so one answer."""
    device = inputs.query.device
    engine = _asked(name, device)
    if not engine.of_ranks:
        return None
    reason = engine.rank_refusal(inputs, share.problem)
    if reason is None:
        return engine
    if name is not None:
        raise ValueError(f"engine={name!r} cannot run this problem over a process group: {reason}.")
    missing.warn_once(device.type, engine.name, reason, tiled.ENGINE.name)
    return None


def _asked(name: str | None, device: torch.device) -> Engine:
    """The engine that may make half-steps: the one named, or the device's own."""
    return engine_of(device) if name is None else ENGINES[name]
