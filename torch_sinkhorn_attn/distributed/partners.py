"""`sinkhorn_matches` over a process group: the partners of the queries and the keys here, in indices of the whole."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_sinkhorn_attn.distributed.preparation import Sharded
from torch_sinkhorn_attn.distributed.share import Share
from torch_sinkhorn_attn.engines.tiled.partners import partners
from torch_sinkhorn_attn.method.partners import Best, merged
from torch_sinkhorn_attn.problem.problem import Inputs, Partners, full_precision


def found_partners(sharded: Sharded, k: int) -> Partners:
    """As `Engine.matches`, of the rows here and the owned columns."""
    share = sharded.share
    inputs = Inputs(*(None if x is None else x.detach() for x in sharded.prepared.inputs))  # type: ignore[arg-type]
    with full_precision(inputs.query.device):
        tiles, _ = share.potentials(inputs._replace(value=None, dustbin_value=None))
        found = partners(tiles, k)
    first_col, first_row = share.columns.start, share.first_row
    cols = _best_of_ranks(share, Best(found.col_plan, _shifted(found.col_index, first_row)))
    from_bin = share.columns.own(found.col_dustbin) if tiles.bins else found.col_dustbin
    row = _shifted(found.row_index, first_col)
    return Partners(row, found.row_plan, cols.place, cols.mass, found.row_dustbin, from_bin)


def _shifted(index: Tensor, first: int) -> Tensor:
    return torch.where(index < 0, -1, index + first)


def _best_of_ranks(share: Share, partial: Best) -> Best:
    """Of the owned columns, from what the rows of each rank have for those it holds."""
    masses = share.columns.candidates(partial.mass, -2, 0.0)
    places = share.columns.candidates(partial.place, -2, -1)
    best = Best(masses[0], places[0])
    for mass, place in zip(masses[1:], places[1:], strict=True):
        best = merged(best, Best(mass, place))
    return best


def best_of_all(share: Share, found: Partners) -> tuple[Tensor, Tensor]:
    """The best keys of all queries `[N, H, L]` and the best queries of all keys `[N, H, S]`, from those here."""
    key_of, query_of = found.row_index[..., 0], found.col_index[..., 0]
    rows = share.wire.gathered(key_of, share.row_counts, -1)
    return rows, share.wire.gathered(query_of, share.columns.counts, -1)
