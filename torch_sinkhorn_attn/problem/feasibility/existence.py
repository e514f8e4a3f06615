"""Whether a call's problems have plans: everything the question needs, to be asked before the call or after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn.dustbin import Dustbin
from torch_sinkhorn_attn.problem import data_checks
from torch_sinkhorn_attn.problem.masks.lines import MaskScan
from torch_sinkhorn_attn.problem.masks.scan import scan_mask
from torch_sinkhorn_attn.problem.masses import Side, dustbin_capacities, marginal_masses
from torch_sinkhorn_attn.problem.support import Support


class Existence(NamedTuple):
    """What shapes the problems of one call; tensors as `prepare` has them, wherever they are."""

    rows: Side
    cols: Side
    capacities: tuple[Tensor | None, Tensor | None]  # the user's, [N, H, L] and [N, H, S]
    dustbin: Dustbin | None
    bins: int
    groups: int
    support: Support
    mask: Tensor | None
    scan: MaskScan | None
    rho: tuple[float, float]
    banded: bool
    window: tuple[int, int] | None
    centered: bool  # whether the window lies around centres given
    is_causal: bool
    dtype: torch.dtype  # in which the mask is added
    mask_floor: float | None

    def masses(self) -> tuple[Tensor, Tensor]:
        """Row and column masses in float64."""
        return marginal_masses(self.rows, self.cols, self.groups, self.dustbin is not None, torch.float64)

    def check(
        self,
        masses: tuple[Tensor, Tensor],
        capacities: tuple[Tensor | None, Tensor | None],
        first: tuple[int, int] = (0, 0),
    ) -> None:
        """ValueError for the first problem without a plan that is positive on its support, or with a bad capacity.
        The masses and capacities are in float64; `first`: the batch element and head to count from."""
        data_checks.check_feasibility(
            *masses, *capacities, self.support, self.mask, self.scan,
            (self.rows.given, self.cols.given, *self.capacities),
            row_segment=self.rows.segment, col_segment=self.cols.segment, groups=self.groups, rho=self.rho,
            banded=self.banded, window=self.window, centered=self.centered, is_causal=self.is_causal, dtype=self.dtype,
            first=first,
        )  # fmt: skip

    def fetched(self) -> Existence:
        """The same on the CPU, with the hulls that a call does without where it does not look."""
        there = _each(self, lambda x: x.cpu())
        if there.mask is None or there.scan is None or there.scan.row_lo.shape == there.scan.row_active.shape:
            return there
        packed = there.rows.segment is not None
        return there._replace(scan=scan_mask(there.mask, there.support, packed, self.dtype, self.mask_floor))

    def at(self, n: int, h: int) -> Existence:
        """One batch element and head."""

        def one(x: Tensor) -> Tensor:
            batch = slice(n, n + 1) if x.shape[0] > 1 else slice(0, 1)
            if x.ndim < 3:  # before any mask a batch element's heads are alike
                return x[batch]
            return x[batch, h : h + 1] if x.shape[1] > 1 else x[batch, :1]

        return _each(self, one)

    def only(self, segment: int) -> Existence:
        """With all tokens of the other segments inactive."""
        rows, cols = (
            x._replace(active=x.active & (x.segment == segment)[:, None]) if x.segment is not None else x
            for x in (self.rows, self.cols)
        )
        return self._replace(rows=rows, cols=cols)

    def refusal(self, place: tuple[int, int] | None = None, segment: int | None = None) -> str | None:
        """Why some problem has no plan, or that of one batch element and head (and segment); None if all have one. On
        the CPU."""
        one = self if place is None else self.at(*place)
        if segment is not None:
            one = one.only(segment)
        try:
            for name, side in (("row_mass", one.rows), ("col_mass", one.cols)):
                data_checks.check_positive_mass(name, side.given, side.active)
            masses = one.masses()
            capacities = dustbin_capacities(one.capacities, *masses, one.rows, one.cols, one.bins)
            one.check(masses, capacities, place or (0, 0))
        except ValueError as error:
            return str(error)
        return None

    def typical_masses(self) -> tuple[Tensor, Tensor]:
        """Mean mass of the active rows and columns of each problem, `[N, H, G]`; what errors are small against."""
        means = []
        for side, mass in zip((self.rows, self.cols), self.masses(), strict=True):
            total, count = (side.total(x, self.groups) for x in (mass, (mass > 0).double()))
            means.append(total / count.clamp(min=1))
        return means[0], means[1]


def _each(x: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`function` of every tensor in tuples of tuples."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, tuple):
        found = [_each(y, function) for y in x]
        return type(x)(*found) if hasattr(x, "_fields") else tuple(found)
    return x
