"""Dense masks, and scores given in place of tokens, of which each rank has its rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_sinkhorn_attn.distributed.agreement import Agreed
from torch_sinkhorn_attn.distributed.columns import blocks
from torch_sinkhorn_attn.distributed.wire import Wire
from torch_sinkhorn_attn.options import Options
from torch_sinkhorn_attn.problem import data_checks
from torch_sinkhorn_attn.problem.argument_checks import score_mask
from torch_sinkhorn_attn.problem.looking import data_checks_enabled
from torch_sinkhorn_attn.problem.masks.dense import DenseMask
from torch_sinkhorn_attn.problem.masks.lines import Lines, MaskScan, without_hulls
from torch_sinkhorn_attn.problem.masks.scan import Extremes
from torch_sinkhorn_attn.problem.scores import as_mask
from torch_sinkhorn_attn.problem.support import Support


def own_mask(
    wire: Wire, mask: Tensor | None, query: Tensor, agreed: Agreed, shape: tuple[int, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """The mask of the rank's rows `[.., l or 1, S or 1]` for scores of that shape, and the whole mask where it has one
    row or column; None where nobody has it whole."""
    if mask is None:
        return None, None
    rows = agreed.sharded["attn_mask"]
    if mask.ndim and mask.shape[-1] not in (1, shape[-1]):
        raise ValueError(
            f"attn_mask has {mask.shape[-1]} columns on rank {wire.rank}; local rows by all {shape[-1]} keys are "
            f"needed (or one column). Padding and packing are said without a mask: by lengths, or by segment ids, in "
            f"shards."
        )
    own = score_mask(mask, (*shape[:-2], agreed.rows[wire.rank] if rows else 1, shape[-1]), query)
    if not rows or mask.ndim < 2:
        return own, mask
    if mask.shape[-1] == 1:
        return own, wire.gathered(mask, agreed.rows, -2)
    return own, None


class MaskReader:
    """Scans a mask of which each rank has its rows, `[N or 1, h, l, S]`."""

    def __init__(self, wire: Wire, mask: Tensor, agreed: Agreed, of_scores: bool = False):
        self.wire, self.mask, self.agreed, self.of_scores = wire, mask, agreed, of_scores

    def __call__(
        self, support: Support, packed: bool, dtype: torch.dtype, floor: float | None, softmax_mode: bool
    ) -> MaskScan:
        wire, mask, lines = self.wire, self.mask, self.lines(support, packed)
        found = self.scan(lines, dtype, floor)
        if mask.dtype != torch.bool and data_checks_enabled(mask):
            high, low = self._reader(lines.among(found.row_active, found.col_active), dtype).extremes()
            ends = wire.maximum(torch.stack([high.nan_to_num(math.inf, math.inf, -math.inf), -low.nan_to_num(0.0)]))
            data_checks.check_mask(Extremes(ends[0], -ends[1]), dtype, softmax_mode, of_scores=self.of_scores)
        rows_active = wire.gathered(found.row_active.to(torch.uint8), self.agreed.rows, -1) > 0
        return without_hulls(rows_active, found.col_active)

    def lines(self, support: Support, packed: bool) -> Lines:
        """The rows here and all columns."""
        start, end = blocks(self.agreed.rows)[self.wire.rank]
        rows = {name: getattr(support, name)[:, start:end] for name in Support._fields if name.startswith("row")}
        return Lines.of(support._replace(**rows), packed)._replace(groups=Lines.of(support, packed).groups)

    def scan(self, lines: Lines, dtype: torch.dtype, floor: float | None) -> MaskScan:
        """Of the rows here."""
        reader, limit = self._reader(lines, dtype), None
        if self.mask.dtype != torch.bool and floor is not None:
            level = self.wire.maximum(reader.level().nan_to_num(math.nan, math.inf, -math.inf))
            limit = torch.where(level.isfinite(), level + floor, -torch.inf)
        return reader.scan(limit, hulls=False)

    def _reader(self, lines: Lines, dtype: torch.dtype) -> _SharedMask:
        found = _SharedMask(self.mask.detach(), lines, dtype)
        found.wire = self.wire
        return found


class ScoresReader:
    """Likewise of scores `[N, H, l, S]` and the mask beside them, of which it makes one mask, `found`."""

    found: Tensor

    def __init__(self, wire: Wire, scores: Tensor, mask: Tensor | None, agreed: Agreed, options: Options):
        self.wire, self.scores, self.agreed, self.options = wire, scores, agreed, options
        self.mask = None if mask is None else mask.expand(*mask.shape[:2], *scores.shape[-2:])

    def __call__(
        self, support: Support, packed: bool, dtype: torch.dtype, floor: float | None, softmax_mode: bool
    ) -> MaskScan:
        left, mask = None, self.mask
        if mask is not None and mask.dtype != torch.bool and floor is not None:
            reader = MaskReader(self.wire, mask, self.agreed)
            left = reader.scan(reader.lines(support, packed), dtype, floor)
        self.found = as_mask(self.scores, mask, left, self.options)
        whole = MaskReader(self.wire, self.found, self.agreed, of_scores=True)
        return whole(support, packed, dtype, None, softmax_mode)


class _SharedMask(DenseMask):
    wire: Wire

    def level(self) -> Tensor:
        if self.lines.length:
            return super().level()
        return self.mask.new_full((self.num, self.heads, self.lines.groups), -torch.inf, dtype=self.dtype)

    def across(self, marked: Tensor) -> Tensor:
        return self.wire.maximum(marked.to(torch.uint8)) > 0
