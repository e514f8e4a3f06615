"""`sinkhorn_plan` and `sinkhorn_plan_band` over a process group: the rows here, of all columns or along a window."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn import bands
from torch_sinkhorn_attn.compat.once import differentiable_once
from torch_sinkhorn_attn.distributed import context
from torch_sinkhorn_attn.distributed.preparation import Sharded
from torch_sinkhorn_attn.distributed.share import Share
from torch_sinkhorn_attn.distributed.tiles import alike
from torch_sinkhorn_attn.engines.tiled.band import BandPasses, band, plan_gradients
from torch_sinkhorn_attn.engines.tiled.tiles import Tiles
from torch_sinkhorn_attn.method.reference import log_sum
from torch_sinkhorn_attn.method.staircase import Field
from torch_sinkhorn_attn.problem import unbalanced
from torch_sinkhorn_attn.problem.problem import Inputs, Potentials, full_precision

FIRST_ONLY = (
    "A plan over a process group has no derivative beyond the first: its backward talks to the other ranks. Compute "
    "what needs second derivatives on one device."
)


class Place(NamedTuple):
    """Which columns of each row are given back."""

    first: Tensor | None  # [N, l] among the held ones, which may lie before them; None: all that are held
    width: int
    log: bool


class Entries(NamedTuple):
    """Of the rows here. The dustbin's are empty without one."""

    values: Tensor  # [N, H, l, W]
    to_bin: Tensor  # [N, H, l]
    from_bin: Tensor  # [N, H, s] of the owned columns
    corner: Tensor  # [N, H]


def plan(sharded: Sharded, log: bool, known: Potentials | None = None) -> tuple[Tensor, Potentials]:
    """`[N, H, l, S]`, or `[N, H, l+1, S+1]` with a dustbin: its row, the same on every rank, and its column last. And
    the potentials, local and owned, which may be known already."""
    share, nothing = sharded.share, -torch.inf if log else 0.0
    columns, bins = share.columns, int(share.problem.has_dustbin)
    found, potentials = _entries(sharded, Place(None, columns.number, log), known)
    total = sum(columns.counts)
    whole = torch.nn.functional.pad(found.values, (columns.start, total - columns.end), value=nothing)
    if not bins:
        return whole, potentials
    row = _Whole.apply(share, found.from_bin)
    corner = found.corner if share.wire.size == 1 else _Alike.apply(share, found.corner)
    column = torch.cat([found.to_bin, corner[..., None]], -1)
    return torch.cat([torch.cat([whole, row[..., None, :]], -2), column[..., None]], -1), potentials


def plan_band(
    sharded: Sharded, first: Tensor, width: int, log: bool, known: Potentials | None = None
) -> tuple[tuple[Tensor, Tensor, Tensor], Potentials]:
    """As `engines.tiled.band`, from the columns `first` `[N, l]` of the whole on; and the potentials as above."""
    found, potentials = _entries(sharded, Place(first - sharded.share.columns.start, width, log), known)
    return (found.values, found.to_bin, found.from_bin), potentials


def returned_plan(sharded: Sharded, log: bool, known: Potentials | None = None) -> tuple[Tensor, Potentials]:
    """What `sinkhorn_plan` gives back, in the caller's unit of mass, and the potentials."""
    prepared = sharded.prepared
    with context.sequence_parallel(None):
        found, potentials = plan(sharded, log, known)
        if prepared.scale is not None:
            found = prepared.scale.of_log_plan(found) if log else prepared.scale.of_plan(found)
    return prepared.unflatten(found) if log else prepared.returned(found), potentials


def returned_band(
    sharded: Sharded, log: bool, window: object, known: Potentials | None = None
) -> tuple[bands.PlanBand, Potentials]:
    """Likewise of `sinkhorn_plan_band`."""
    share = sharded.share
    first, width, cut = bands.place(sharded.whole, window)
    first, *needing = (
        share.local_of(x).expand(share.problem.sizes[0], -1) for x in (first, *(() if cut is None else (cut,)))
    )
    with context.sequence_parallel(None):
        found, potentials = plan_band(sharded, first, width, log, known)
        return bands.given_back(sharded.prepared, found, first, log, *needing), potentials


def _entries(sharded: Sharded, place: Place, known: Potentials | None) -> tuple[Entries, Potentials]:
    *found, row, col = _Plan.apply(sharded.share, place, known, *sharded.prepared.inputs)
    unbalanced.warn_once(col, sharded.share.problem.solver)
    return Entries(*found), Potentials(row, col)


class _Plan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, share: Share, place: Place, known: Potentials | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        inputs = Inputs(*tensors)._replace(value=None, dustbin_value=None)  # type: ignore[arg-type]
        with full_precision(inputs.query.device):
            tiles, potentials = share.potentials(inputs, known)
            values, to_bin, from_bin = _read(tiles, place)
        owned = share.owned(potentials.col)
        corner = tiles.u.new_zeros(tiles.u.shape[:2])
        if tiles.bins:
            from_bin = share.columns.own(from_bin).contiguous()
            corner = log_sum(tiles.log_dustbin_plan.corner, -1)
            corner = corner if place.log else corner.exp()
        ctx.share, ctx.place = share, place
        ctx.save_for_backward(*tensors, values, potentials.row, owned)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(potentials.row, owned)
        return values, to_bin, from_bin, corner, potentials.row, owned

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, values, row, owned = ctx.saved_tensors
        inputs, share, place = Inputs(*tensors), ctx.share, ctx.place
        wanted = ctx.needs_input_grad[3:]
        wants_mask = inputs.mask is not None and wanted[Inputs._fields.index("mask")]
        local = inputs._replace(value=None, dustbin_value=None)
        with torch.no_grad(), full_precision(values.device):
            potentials = Potentials(row, share.held(owned))
            tiles = share.scores(local).at(row[-1], potentials.col[-1])
            given = _completed(share, grads, values)
            passes = _passes(tiles, place, values, given, wants_mask)
            passes.may_scale = alike(tiles, potentials)
            found = share.home(local, plan_gradients(passes, potentials))
        results = [
            g.to(x.dtype) if x is not None and g is not None and want else None
            for g, x, want in zip(found, inputs, wanted, strict=True)
        ]
        return None, None, None, *differentiable_once(results, [*inputs, *grads], FIRST_ONLY)


def _read(tiles: Tiles, place: Place) -> tuple[Tensor, Tensor, Tensor]:
    if place.first is not None:
        return band(tiles, place.first, place.width, place.log)
    values = tiles.u.new_full((tiles.num, tiles.heads, tiles.length, tiles.size), -torch.inf)
    for i, rows in enumerate(tiles.row_blocks):
        for j in tiles.columns(i):
            values[..., rows, tiles.col_blocks[j]] = tiles.supported_log_plan(i, j)
    to_bin, from_bin, _ = tiles.log_dustbin_plan if place.log else tiles.dustbin_plan
    return values if place.log else values.exp_(), to_bin, from_bin


def _completed(share: Share, grads: tuple[Tensor | None, ...], values: Tensor) -> tuple[Tensor | None, ...]:
    """Cotangents of values, of the dustbin's column and of its row over the held columns, and of the corner. What one
    rank has none of another may have, so all are there on all ranks."""
    grad = torch.zeros_like(values) if grads[0] is None else grads[0]
    if not share.problem.has_dustbin:
        return grad, None, None, None
    heads, cols = values.shape[:2], share.columns.owned
    from_bin = values.new_zeros(*heads, cols.stop - cols.start) if grads[2] is None else grads[2]
    corner = values.new_zeros(heads) if grads[3] is None else grads[3]
    return grad, grads[1], share.columns.spread(from_bin, -1), corner


def _passes(
    tiles: Tiles, place: Place, values: Tensor, grads: tuple[Tensor | None, ...], wants_mask: bool
) -> BandPasses:
    kind = _HeldPasses if place.first is None else BandPasses
    return kind(tiles, place.first, values, grads[:3], wants_mask, place.log, grads[3])  # type: ignore[arg-type]


class _HeldPasses(BandPasses):
    """The passes where P*D is there for all held columns."""

    def real_column_sums(self) -> Tensor:
        return self.weighted.sum(-2)

    def score_cotangent(self, field: Field, i: int, j: int) -> Tensor:
        t = self.tiles
        return t.less_field(self.weighted[..., t.row_blocks[i], t.col_blocks[j]], field, i, j)


class _Whole(torch.autograd.Function):
    """A vector of all columns, on every rank, from the owned; its cotangents from all ranks are added up."""

    @staticmethod
    def forward(ctx: Any, share: Share, owned: Tensor) -> Tensor:
        ctx.share = share
        return share.wire.gathered(owned, share.columns.counts, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        share = ctx.share
        return None, share.wire.scattered(grad, share.columns.counts, -1).sum(0)


class _Alike(torch.autograd.Function):
    """What every rank has alike; its cotangents from all ranks are added up."""

    @staticmethod
    def forward(ctx: Any, share: Share, x: Tensor) -> Tensor:
        ctx.share = share
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, ctx.share.wire.all_reduce(grad)
