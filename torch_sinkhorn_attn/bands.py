"""The plan of a window as a band: `(..., L, W)` numbers in place of `(..., L, S)`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from torch_sinkhorn_attn.boundary import bands
from torch_sinkhorn_attn.compat.tracing import one_node
from torch_sinkhorn_attn.distributed import context
from torch_sinkhorn_attn.engines import REFERENCE, choose
from torch_sinkhorn_attn.functional import refuse_dropout, refuse_unknown
from torch_sinkhorn_attn.method import reference
from torch_sinkhorn_attn.options import flag
from torch_sinkhorn_attn.problem.arguments import Keywords, Prepared, prepare
from torch_sinkhorn_attn.problem.looking import can_look
from torch_sinkhorn_attn.problem.problem import Inputs, Problem, full_precision


class PlanBand(NamedTuple):
    """Entries of a plan (or of its logarithm) along a window.

    Attributes:
        values: `(..., H, L, W)`, row i at the columns `first_column[i], ..., first_column[i] + W - 1`; 0 off the
            support, -inf in logarithms.
        first_column: `(..., L)` int64, the same for all heads; 0 where a row has no support. No column lies beyond
            S - 1.
        row_dustbin, col_dustbin: `(..., H, L)`, `(..., H, S)`, each token's mass to and from its own dustbin, or the
            logarithm; None without one.
    """

    values: Tensor
    first_column: Tensor
    row_dustbin: Tensor | None = None
    col_dustbin: Tensor | None = None

    def columns(self) -> Tensor:
        """The column of each value, `(..., L, W)` int64, the same for all heads."""
        return self.first_column[..., None] + torch.arange(self.values.shape[-1], device=self.first_column.device)

    def dense(self, size: int, outside: float = 0.0) -> Tensor:
        """The matrix `(..., H, L, size)` of all S = `size` columns, with `outside` elsewhere: 0, or -inf for
        logarithms. The dustbin is left out."""
        columns = self.columns()
        if self.values.ndim > columns.ndim:
            columns = columns.unsqueeze(-3)
        full = self.values.new_full((*self.values.shape[:-1], size), outside)
        return full.scatter(-1, columns.expand(self.values.shape), self.values)


@one_node
def sinkhorn_plan_band(
    query: Tensor,
    key: Tensor | None = None,
    attn_mask: Tensor | None = None,
    *,
    log: bool = False,
    sequence_group: Any = None,
    **options: Unpack[Keywords],
) -> PlanBand:
    """`sinkhorn_plan` of a window as a band: O(L W) memory, W = min(S, left + right + 1).

    A window counts active keys. Where segment ids mark inactive ones between them, a row reaches further than W
    columns: then W is what the widest row takes, or, where data may not be looked at, those rows are NaN.

    It has the same entries and the same gradients, whose passes run over tiles in plain PyTorch. They may be taken
    once: what needs second derivatives or forward mode takes `sinkhorn_plan`.

    Args:
        query, key, attn_mask, options: as in `sinkhorn_plan`; `window` is needed, with both its sides. Lengths,
            segments and centres may be data: they move `first_column`.
        log: give logarithms, as in `sinkhorn_plan`.
        sequence_group: as in `sinkhorn_attention`; the rows are the local ones, `first_column` counts all keys, and
            `col_dustbin` is of the local keys.

    Returns:
        `PlanBand`.

    Raises:
        TypeError, ValueError: as `sinkhorn_plan`, or for a `window` without two sides.

    >>> import torch
    >>> from torch_sinkhorn_attn import sinkhorn_plan
    >>> x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    >>> band = sinkhorn_plan_band(x, x, window=(1, 1))
    >>> band.values.shape, band.first_column
    (torch.Size([1, 6, 3]), tensor([0, 0, 1, 2, 3, 3]))
    >>> torch.allclose(band.dense(6), sinkhorn_plan(x, x, window=(1, 1)))
    True
    """
    flag("log", log)
    refuse_unknown("sinkhorn_plan_band", options)
    refuse_dropout("sinkhorn_plan_band", options, "the plan has no dropout")
    group = context.group_of(sequence_group, query)
    if group is not None:
        from torch_sinkhorn_attn.distributed import calls

        return calls.sharded_band(group, query, key, attn_mask, options, log)
    prepared = prepare(query, key, None, attn_mask, **options)
    inputs, problem = prepared.inputs, prepared.problem
    first, width, cut = place(problem, options.get("window"))
    engine = choose(prepared.engine, inputs, problem)
    if engine == REFERENCE:
        with full_precision(inputs.query.device):
            found = reference_band(inputs, problem, first, width, log)
    else:
        found = bands.plan_band(inputs, problem, engine, first, width, log)
    return given_back(prepared, found, first, log, cut)


def place(problem: Problem, window: object) -> tuple[Tensor, int, Tensor | None]:
    """The first column of each row `[N, L]`, how many there are, and which rows would need more, if some may."""
    left, right = problem.outline.window_left, problem.outline.window_right
    if min(left, right) < 0:
        raise ValueError(
            f"sinkhorn_plan_band got window={window}: a band is as wide as its window, which must have two sides, "
            "(left, right) with both 0 or more. Without one take sinkhorn_plan."
        )
    size, support = problem.sizes[3], problem.support
    width, cut = min(size, left + right + 1), None
    if support.row_segment is not None:  # inactive tokens may lie between those of a segment
        reach = support.row_hi - support.row_lo
        if can_look(reach):
            width = max(width, int(reach.max())) if reach.numel() else width
        else:
            cut = reach > width
    return support.row_lo.clamp(max=size - width), width, cut


def reference_band(
    inputs: Inputs, problem: Problem, first: Tensor, width: int, log: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: read out of the dense plan."""
    dense = reference.dense_problem(inputs, problem)
    full, _ = reference.plan_and_potentials(dense, problem, log)
    length, size = problem.sizes[2:]
    columns = first[:, None, :, None] + torch.arange(width, device=first.device)
    values = full[..., :length, :size].gather(-1, columns.expand(*full.shape[:2], -1, -1))
    if not problem.has_dustbin:
        return values, full.new_zeros(0), full.new_zeros(0)
    full = reference.fold_dustbins(full, problem, log)
    return values, full[..., :length, -1], full[..., -1, :size]


def given_back(
    prepared: Prepared, found: tuple[Tensor, Tensor, Tensor], first: Tensor, log: bool, cut: Tensor | None = None
) -> PlanBand:
    """In the caller's unit of mass, shapes and dtype; NaN in rows `cut` `[N, L]`, which need more columns."""
    if cut is not None:
        found = found[0].masked_fill(cut[:, None, :, None], torch.nan), *found[1:]
    parts: list[Tensor | None] = list(found) if prepared.problem.has_dustbin else [found[0], None, None]
    scale = prepared.scale
    for i, x in enumerate(parts):
        if x is not None and scale is not None:
            wide = x if i == 0 else x[..., None]
            parts[i] = (scale.of_log_plan(wide) if log else scale.of_plan(wide)).reshape(x.shape)
    values, *bins = (None if x is None else prepared.unflatten(x if log else x.to(prepared.dtype)) for x in parts)
    assert values is not None
    return PlanBand(values, first.reshape(*prepared.batch, first.shape[-1]), *bins)
