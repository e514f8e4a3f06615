"""`certify` over a process group: the certificate of the whole problem, the same on every rank."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from torch_sinkhorn_attn.certificates import Asked, Measured, cotangent_of, value_shape
from torch_sinkhorn_attn.distributed import context
from torch_sinkhorn_attn.distributed.calls import opened
from torch_sinkhorn_attn.distributed.columns import blocks
from torch_sinkhorn_attn.distributed.lines import SharedLines
from torch_sinkhorn_attn.distributed.passes import WholePasses, dense_scores
from torch_sinkhorn_attn.distributed.preparation import Call, Sharded, prepare_shard
from torch_sinkhorn_attn.distributed.share import Share
from torch_sinkhorn_attn.distributed.tiles import SharedPasses, SharedTiles
from torch_sinkhorn_attn.distributed.wire import Wire
from torch_sinkhorn_attn.engines.tiled.engine import attention_output, iterate
from torch_sinkhorn_attn.problem.arguments import Keywords
from torch_sinkhorn_attn.problem.problem import Inputs, OutputGrads, Potentials
from torch_sinkhorn_attn.problem.segments import Components, segments
from torch_sinkhorn_attn.thermometer import exact, quick
from torch_sinkhorn_attn.thermometer.probes import probe


def measured(group: Any, asked: Asked, keywords: Keywords) -> Measured:
    """As on one device. Passes and advice are in vectors of the whole problem."""
    wire = Wire(group)
    words = f"certify(mode={asked.mode!r}, exact_diameter={asked.exact_diameter}, grad={asked.grad_output is not None})"
    call, _ = opened(words, group, asked.query, asked.key, asked.value, asked.mask, keywords)
    if asked.grad_output is not None and isinstance(call.value, Tensor):
        shape = (*call.query.shape[:-1], call.value.shape[-1])
        call = call._replace(check=partial(cotangent_of, asked.grad_output, shape, call.query))
    if asked.value is None and asked.mode == "exact":
        call = call._replace(width=value_shape(call.query, call.key)[-1])
    sharded = prepare_shard(wire, call, each=True)
    with context.sequence_parallel(None):
        if asked.mode == "quick":
            return _quick(sharded)
        return _exact(sharded, call, asked.grad_output, asked.exact_diameter)


def _quick(sharded: Sharded) -> Measured:
    passes = WholePasses(sharded.share, sharded.share.gathered(sharded.prepared.inputs), sharded.whole)
    solver = passes.problem.solver
    found = passes.solve(tail_iters=solver.tail_iters + 1) if solver.kept else passes.solve()
    at = quick.at_end(passes, found)
    return Measured(quick.numbers(passes, at, sharded.prepared.scale), passes, at, sharded.prepared)


def _exact(sharded: Sharded, call: Call, grad_output: Tensor | None, exact_diameter: bool) -> Measured:
    share, prepared = sharded.share, sharded.prepared
    inputs = prepared.inputs
    if inputs.value is None:
        inputs = inputs._replace(value=_value_probe(share, inputs, call))
    assert inputs.value is not None
    held = share.gathered(inputs)
    scores = SharedTiles(held, share)
    potentials = iterate(scores)
    tiles = scores.at(potentials.row[-1], potentials.col[-1])
    if grad_output is None:
        grad_output = _cotangent_probe(share, call.query, inputs.value.shape[-1])
    grads = OutputGrads(grad_output.reshape(*tiles.u.shape[:2], tiles.length, inputs.value.shape[-1]))
    passes = WholePasses(share, held, sharded.whole)
    size = sum(share.columns.counts) + share.problem.num_dustbins
    at = exact.Solved(
        tiles,
        potentials,
        SharedPasses(tiles, attention_output(tiles), grads, potentials),
        _lines(share, passes.parts()),
        share.held_of(exact.power_start((*tiles.v.shape[:2], size), tiles.v)),
        partial(dense_scores, share, passes.inputs),
        segments(sharded.whole),
    )
    numbers = exact.exact_numbers(at, exact_diameter, prepared.scale)
    last = Potentials(share.whole_rows(potentials.row[-1]), share.whole_cols(potentials.col[-1]))
    return Measured(numbers, passes, quick.following(passes, last), prepared)


def _value_probe(share: Share, inputs: Inputs, call: Call) -> Tensor:
    """The rows here of the probe that one device takes, `[N, Hk, s, E]`."""
    keys = call.query if call.key is None else call.key
    shape = list(value_shape(call.query, call.key))
    shape[-2] = sum(share.columns.counts)
    start, end = blocks(share.columns.counts)[share.wire.rank]
    own = probe((1, *shape), keys, seed=0)[..., start:end, :].flatten(0, -3)
    num, heads = inputs.key.shape[:2]
    own = own.repeat_interleave(num * heads // own.shape[0], 0)  # where heads got keys of their own
    return own.reshape(num, heads, end - start, shape[-1]).to(inputs.query.dtype)


def _cotangent_probe(share: Share, query: Tensor, width: int) -> Tensor:
    """Likewise, of the output's."""
    start, end = blocks(share.row_counts)[share.wire.rank]
    return probe((*query.shape[:-2], sum(share.row_counts), width), query, seed=1)[..., start:end, :]


def _lines(share: Share, parts: Components) -> SharedLines:
    row = None if parts.row is None else share.local_of(parts.row)
    col = None if parts.col is None else share.held_of(parts.col)
    return SharedLines.of(Components(row, col, parts.number), share.wire, share.columns, share.problem.sizes[2])
