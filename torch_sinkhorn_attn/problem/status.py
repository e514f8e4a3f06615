"""What a call found, and in words: converged, not converged, or no plan at all."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from torch_sinkhorn_attn.options import CONVERGED_WITHIN
from torch_sinkhorn_attn.problem.arguments import Keywords, prepare
from torch_sinkhorn_attn.problem.feasibility.existence import Existence


class Status(IntEnum):
    """Of one problem.

    Attributes:
        CONVERGED: no marginal that is enforced is off by more than the tolerance; in softmax mode only rows are
            enforced.
        NOT_CONVERGED: some is. More iterations help.
        NO_PLAN: no plan with these masses is positive on the support, so the potentials grow without end, whatever the
            residuals are by now. More iterations do not help.
        RELAXED: no marginal is enforced, so residuals tell nothing.
    """

    CONVERGED = 0
    NOT_CONVERGED = 1
    NO_PLAN = 2
    RELAXED = 3

    @property
    def words(self) -> str:
        return self.name.lower().replace("_", " ")


class _Fields(NamedTuple):
    row_potential: Tensor
    col_potential: Tensor
    row_residual: Tensor
    col_residual: Tensor
    row_dustbin: Tensor | None
    col_dustbin: Tensor | None


class SinkhornAux(_Fields):
    """What `sinkhorn_attention(..., return_aux=True)` returns beside the output: a tuple of six.

    Attributes:
        row_potential: `(..., H, L)` final row potentials u, log domain, detached; 0 for inactive tokens. With a dustbin
            the last dimension has one trailing entry for it (one per segment, `min(L, S)` entries, when packed).
        col_potential: `(..., H, S)` final column potentials v, likewise.
        row_residual: `(..., H)` largest absolute row marginal error, detached.
        col_residual: `(..., H)` largest absolute column marginal error, detached.
        row_dustbin: `(..., H, L)` mass each query sends to the dustbin, differentiable; None without a dustbin.
        col_dustbin: `(..., H, S)` mass each key receives from the dustbin, differentiable; None without one.

    `status` and `verdict` say what the residuals mean.
    """

    # Of the call; kept by eager calls, lost by torch.compile, export and vmap.
    existence: Existence | None = None
    softmax_mode: bool = False

    def status(
        self, within: float = CONVERGED_WITHIN, attn_mask: Tensor | None = None, **options: Unpack[Keywords]
    ) -> Tensor:
        """`(..., H)` int8 on the CPU: a `Status` for each batch element and head.

        A marginal counts as met within `within` times the mean mass of an active token (of the whole problem's, when
        packed). Whether a plan exists at all is decided as before an eager CPU call (see `set_checks`); this looks at
        data, on accelerators too, but only when asked.

        Args:
            within: relative, positive.
            attn_mask, options: of the call, to be repeated for what comes out of torch.compile, export or vmap (the
                residuals alone do not hold masses and support); defaults are assumed for what is not. Where they are
                left out for an eager call, the call itself is remembered.

        >>> import torch
        >>> from torch_sinkhorn_attn import sinkhorn_attention
        >>> x = torch.randn(1, 1, 6, 4, generator=torch.Generator().manual_seed(0))
        >>> out, aux = sinkhorn_attention(x, x, x, base_iters=100, return_aux=True)
        >>> aux.status(), aux.verdict()
        (tensor([[0]], dtype=torch.int8), 'converged')
        """
        return self._judged(within, attn_mask, options)[0]

    def verdict(
        self, within: float = CONVERGED_WITHIN, attn_mask: Tensor | None = None, **options: Unpack[Keywords]
    ) -> str:
        """`status` in words, worst first: which batch elements and heads, how large their errors are, why there is no
        plan. Arguments as there."""
        found, reasons = self._judged(within, attn_mask, options)
        count, parts = found.numel(), []
        for status in (Status.NO_PLAN, Status.NOT_CONVERGED, Status.RELAXED, Status.CONVERGED):
            places = (found == status).nonzero().tolist()
            if not places:
                continue
            text = status.words
            if len(places) < count:
                shown = ", ".join(str(tuple(place)) for place in places[:4]) + (", ..." if len(places) > 4 else "")
                text += f" in {len(places)} of {count} problems (batch and head: {shown})"
            if status == Status.NOT_CONVERGED:
                worst = torch.stack([x.detach().cpu()[found == status].max() for x in self[2:4]]).max()
                text += f": a marginal is off by {worst:.3g}"
                known = self.existence is not None or self.softmax_mode
                if not known and attn_mask is None and not options:
                    text += " (repeat the call's mask and options here to learn whether a plan exists)"
            if status == Status.NO_PLAN:
                text += f": {reasons[0]}"
            parts.append(text)
        return "; ".join(parts) or "nothing was asked for"

    def _judged(self, within: float, mask: Tensor | None, options: Any) -> tuple[Tensor, list[str]]:
        existence, shape = self.existence, self.row_residual.shape
        if (existence is None and not self.softmax_mode) or mask is not None or options:
            existence = self._asked_again(mask, options)
        residuals = tuple(x.detach().cpu().double().reshape(-1, shape[-1], 1) for x in self[2:4])
        found, reasons = judge(residuals, within, existence, by_segment=False)
        return found[..., 0].reshape(shape), reasons

    def _asked_again(self, mask: Tensor | None, options: Any) -> Existence | None:
        """The question for another mask and options, from zeros in place of queries and keys."""
        dustbin, packed = options.get("dustbin"), options.get("query_segment_ids") is not None
        rows, cols = self.row_potential, self.col_potential
        bins = 0 if dustbin is None else 1
        if bins and packed:  # min(L, S) behind either side
            bins = min(rows.shape[-1], cols.shape[-1]) // 2
        query, key = (x.new_zeros(*x.shape[:-1], x.shape[-1] - bins, 1) for x in (rows, cols))
        return prepare(query, key, None, mask, **options, check_data=False).existence


def judge(
    residuals: tuple[Tensor, ...], within: float, existence: Existence | None, by_segment: bool
) -> tuple[Tensor, list[str]]:
    """Statuses of problems with these row and column residuals `[N, H, G]` (CPU, float64; G = 1 unless `by_segment`),
    and why those without a plan have none. `existence` is None where no marginal but the rows' is asked for."""
    if existence is None:
        return torch.where(residuals[0] <= within, Status.CONVERGED, Status.NOT_CONVERGED).to(torch.int8), []
    existence = existence.fetched()
    enforced = [rho == 1.0 for rho in existence.rho]
    if not any(enforced):
        return torch.full(residuals[0].shape, Status.RELAXED, dtype=torch.int8, device="cpu"), []
    typical = existence.typical_masses()
    if not by_segment:
        typical = typical[0].amax(-1, keepdim=True), typical[1].amax(-1, keepdim=True)
    met = torch.ones_like(residuals[0], dtype=torch.bool)
    for error, mass, needed in zip(residuals, typical, enforced, strict=True):
        met &= (error <= within * mass) | (not needed)
    found = torch.where(met, Status.CONVERGED, Status.NOT_CONVERGED).to(torch.int8)
    reasons: list[str] = []
    if existence.refusal() is None:
        return found, reasons
    for n, h, g in torch.ones_like(found).nonzero().tolist():
        reason = existence.refusal((n, h), g if by_segment else None)
        if reason is not None:
            found[n, h, g] = Status.NO_PLAN
            reasons.append(reason)
    return found, reasons
