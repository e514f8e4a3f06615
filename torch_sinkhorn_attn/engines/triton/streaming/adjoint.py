"""The passes of the adjoint by streaming kernels: what they are given, and what they gather.

Factors are told by exponents. Whether a pass may apply their exponentials outside of the plan is decided on the device,
for each batch element and key head: a kernel for either way is launched, and returns at once where the other has the
word.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_sinkhorn_attn.engines.tiled.adjoint import AdjointPasses, OutputCotangent
from torch_sinkhorn_attn.engines.triton.layout import LARGEST_CHUNK, Number, power_of_two
from torch_sinkhorn_attn.engines.triton.streaming import adjoint_pass, mask_gradient
from torch_sinkhorn_attn.engines.triton.streaming.adjoint_pass import Cotangents, Results
from torch_sinkhorn_attn.engines.triton.streaming.adjoint_tiles import Dense, Dropout, Riders
from torch_sinkhorn_attn.engines.triton.streaming.adjoint_vectors import Reference, Terms, prepared
from torch_sinkhorn_attn.engines.triton.streaming.lines import StreamedPlan
from torch_sinkhorn_attn.method.staircase import Factor, Field
from torch_sinkhorn_attn.problem.problem import Inputs


class StreamingPasses(AdjointPasses):
    """The passes, and what rides in them; where D comes from a subclass says."""

    may_scale = False  # the host does not know
    grad_value: Tensor | None = None  # [N, Hk, S, Ev]
    grad_key: Tensor | None = None  # [N, Hk, S, E]
    grad_query: Tensor | None = None
    grad_mask: Tensor | None = None
    sums: Tensor | None = None  # [parts, N, H, S]

    def __init__(self, plan: StreamedPlan, cotangents: Cotangents, riders: Riders, wants_mask: bool):
        """The tile of reference is W for D' = <dO, V>, and P where D is given."""
        super().__init__(plan)
        self.layout, layout = plan.layout, plan.layout
        self.cotangents, self.riders, self.wants_mask = cotangents, riders, wants_mask
        shift = None if riders.dense else plan.log_a.masked_fill(plan.row_dead, 0.0)
        u = plan.u if shift is None else plan.u - shift
        lives = layout.live(u, plan.row_dead, False), layout.live(plan.v, plan.col_dead, True)
        self.reference = Reference(*lives, shift)
        self.plain_row = shift is not None and plan.problem.solver.rho_row == 1.0  # A^R is W then

    def column(self, x: Tensor, factor: Factor, field: Field | None = None, deferred: Factor | None = None) -> Tensor:
        """factor^T x; dV rides in the first pass, dK in the one with a field. A `deferred` factor's weight is minus rho
        times the result, and the column sums if it is the first pass: the kernel completes dK by it."""
        first = self.sums is None
        if not first and field is None:
            return self.plan.column_pass(x, factor)
        size, found = self.layout.cols.size, None
        if self.plan.dustbin is not None:
            found = self.plan.complete_cols(x.new_zeros(*x.shape[:2], size), x, factor)
        beside = None
        if deferred is not None:
            beside = x.new_zeros(*x.shape[:2], size) if found is None else -found[..., :size]
            if first and self.bins is not None:
                beside = beside + self.bins.row
        riders = self.riders._replace(
            image=self.tail,
            values=first and self.gathers_value,
            field=field is not None,
            deferred=deferred is not None,
            sums=first and (not self.gathers_value or (field is not None and self.cotangents.chunks > 1)),
        )
        exact = self.plain_row and self.tail and first
        given = Terms(x, self._told(factor, exact), field, deferred, beside, exact and deferred is None)
        image, sums = self._pass(riders, given, column=True)
        self.sums = sums if first else self.sums
        return image if found is None else torch.cat([image + found[..., :size], found[..., size:]], -1)

    def row(self, y: Tensor, factor: Factor, field: Field | None = None) -> Tensor:
        """factor y; dQ and dmask ride in the one with a field."""
        if field is None:
            return self.plan.row_pass(y, factor)
        softmax = self.plan.problem.solver.kept == 0  # the image is not asked for
        riders = self.riders._replace(image=self.tail and not softmax, field=True)
        exact = self.plain_row and self.tail and softmax
        image, _ = self._pass(riders, Terms(y, self._told(factor, exact), field, exact=exact), column=False)
        return self.plan.complete_rows(image, y, factor)

    def real_column_sums(self) -> Tensor:
        assert self.sums is not None
        return self.sums[0] if self.sums.shape[0] == 1 else self.sums.sum(0)

    def gathered(self, field: Field) -> Inputs:
        assert self.grad_query is not None and self.grad_key is not None
        return Inputs(self.grad_query, self.grad_key, self.grad_value, self.grad_mask)

    @property
    def tail(self) -> bool:
        """Whether the images are asked for."""
        return self.plan.problem.solver.gradient != "implicit"

    def _told(self, factor: Factor, exact: bool) -> Factor | None:
        return None if exact or not self.tail else factor

    def _pass(self, riders: Riders, given: Terms, column: bool) -> tuple[Tensor, Tensor]:
        """A launch, and with rows outside that for the mask: the real part of the image, and the column sums by
        parts."""
        layout, solver = self.layout, self.plan.problem.solver
        vectors = prepared(layout, self.reference, given, column)
        riders = riders._replace(plain=given.factor is None)
        side, heads = (layout.cols, self.plan.inputs.key.shape[1]) if column else (layout.rows, layout.heads)
        image = given.x.new_zeros(layout.num, layout.heads, side.size)
        sums = grad = value = image
        if riders.values or riders.sums:
            parts = 1 if riders.sums else self.cotangents.chunks
            sums = image.new_zeros(parts, *image.shape)
        if riders.field:
            grad = image.new_empty(layout.num, heads, side.size, layout.static.features)
        if riders.values:
            value = self.grad_value = image.new_empty(layout.num, heads, side.size, self.cotangents.static.features)
        scale = Number.of(solver.scale / solver.epsilon)
        results = Results(image, sums, value, grad, scale, Number.of(solver.rho_col))
        adjoint_pass.run(layout, self.cotangents, vectors, results, riders, column)
        if riders.field and column:
            self.grad_key = grad
        elif riders.field:
            self.grad_query = grad
            if (mask := self.plan.inputs.mask) is not None and self.wants_mask:
                self.grad_mask = mask_gradient.run(layout, self.cotangents, vectors, riders, mask)
        return image, sums


class OutputPasses(StreamingPasses):
    """The passes for the cotangent of the output."""

    def __init__(self, plan: StreamedPlan, cotangent: OutputCotangent, wants_mask: bool):
        riders = Riders(dropout=plan.problem.dropout_seed is not None)
        super().__init__(plan, _of_output(plan, cotangent), riders, wants_mask)
        self.row_sums, self.bins = cotangent.row_sums, cotangent.bins


def _of_output(plan: StreamedPlan, cotangent: OutputCotangent) -> Cotangents:
    """D' = <dO, V>, dropped out."""
    problem, inputs, layout = plan.problem, plan.inputs, plan.layout
    assert inputs.value is not None and layout.values is not None
    grad = cotangent.output.to(inputs.query.dtype).contiguous()
    outputs = layout.rows._replace(
        data=grad, stride_n=grad.stride(0), stride_h=grad.stride(1), stride_l=grad.stride(2), share=1
    )
    features = inputs.value.shape[-1]
    static = layout.static._replace(features=features, chunk=min(LARGEST_CHUNK, power_of_two(features)))
    dropout = no_dropout(plan)
    if problem.dropout_seed is not None:
        p = problem.solver.dropout_p
        dropout = Dropout(problem.dropout_seed, int(p * 2**32), Number.of(1 / (1 - p) if p < 1 else 0.0))
    return Cotangents(outputs, layout.values, static, Dense(plan.u, 0, 0, 0, 0), dropout)


def no_dropout(plan: StreamedPlan) -> Dropout:
    return Dropout(plan.u, 0, Number.of(1.0))
