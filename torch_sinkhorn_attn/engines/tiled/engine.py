"""The tiled engine: the schedule of the definition over row and column blocks, in plain PyTorch, on any device.

Between forward and backward only the inputs, the output and the duals live: O(n + m) numbers per head. Temporaries are
a few tiles, never an n x m tensor, and only the tiles the support can touch are read. The dustbin is two vectors beside
the tiles. float16 and bfloat16 inputs are widened tile by tile; potentials and sums are float32 (float64 for float64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_sinkhorn_attn.engines.base import Engine
from torch_sinkhorn_attn.engines.tiled.adjoint import AdjointPasses, OutputCotangent, attention_gradients
from torch_sinkhorn_attn.engines.tiled.augmented import AugmentedPlan
from torch_sinkhorn_attn.engines.tiled.tiles import Tiles
from torch_sinkhorn_attn.method.reference import stopped_base
from torch_sinkhorn_attn.method.staircase import Factor, Field
from torch_sinkhorn_attn.problem.mass_scale import MassScale
from torch_sinkhorn_attn.problem.problem import Gradients, Inputs, OutputGrads, Potentials, Problem, Result
from torch_sinkhorn_attn.problem.segments import centre_gauge, largest, mass_of


class TiledEngine(Engine):
    """Plain PyTorch, on any device: it runs every problem."""

    name = "tiled"

    def status(self) -> str:
        return "plain PyTorch, any device"

    def refusal(self, inputs: Inputs, problem: Problem) -> str | None:
        return None

    def solve(self, inputs: Inputs, problem: Problem) -> Potentials:
        return iterate(Tiles(inputs, problem))

    def forward(self, inputs: Inputs, problem: Problem, residuals: bool = True) -> Result:
        assert inputs.value is not None
        return attend(Tiles(inputs, problem), residuals)

    def backward(
        self, inputs: Inputs, problem: Problem, output: Tensor, potentials: Potentials, grads: OutputGrads
    ) -> Gradients:
        """The adjoint: 2R passes for the tail (two for R = 0), the key cotangent riding in the last column pass and the
        query cotangent in the last row pass; conjugate gradients in between when the gradient is implicit."""
        tiles = Tiles(inputs, problem).at(potentials.row[-1], potentials.col[-1])
        return gradients(TiledPasses(tiles, output, grads), potentials)


ENGINE = TiledEngine()


def attend(scores: AugmentedPlan, residuals: bool) -> Result:
    """Forward over the scores."""
    potentials = iterate(scores)
    u, v = potentials.row[-1], potentials.col[-1]
    tiles = scores.at(u, v)
    to_bin, from_bin, _ = tiles.dustbin_plan
    if residuals:
        row_residual, col_residual = (largest(x) for x in marginal_errors(tiles))
    else:
        row_residual, col_residual = (u.new_full(u.shape[:2], torch.nan) for _ in range(2))
    return Result(attention_output(tiles), potentials, row_residual, col_residual, to_bin, from_bin)


def gradients(passes: TiledPasses, potentials: Potentials) -> Gradients:
    """The adjoint of `attend`, from its passes."""
    return attention_gradients(passes, passes.d, potentials)


def iterate(tiles: AugmentedPlan) -> Potentials:
    """T stopped and R kept iterations: the stacked duals."""
    problem = tiles.problem
    stopped, kept = problem.solver.stopped, problem.solver.kept
    u, v = stopped_base(*tiles.initial_potentials(), tiles.column_half_step, tiles.row_half_step, problem, tiles.own)
    if problem.solver.balanced and stopped:
        u, v = centre_gauge(u, v, tiles.log_a, tiles.log_b, tiles.parts)
    rows, cols = [u], [v]
    for _ in range(kept):
        v = tiles.column_half_step(u)
        u = tiles.row_half_step(v)
        rows.append(u)
        cols.append(v)
    if kept == 0:
        rows = [tiles.row_half_step(v)]
    return Potentials(torch.stack(rows), torch.stack(cols))


def attention_output(tiles: AugmentedPlan) -> Tensor:
    """O_i = (1/a_i) sum_j P_ij V_j, the dustbin's value included. Balanced rows of P sum to a_i exactly, so they are
    divided by their own sum: that cancels the rounding of scores that are large."""
    mass, row_sums = tiles.value_pass()
    if tiles.dustbin is not None:
        row_sums = row_sums + tiles.dustbin_plan[0]
    if tiles.inputs.dustbin_value is not None:
        mass = mass + tiles.dustbin_plan[0][..., None] * tiles.inputs.dustbin_value.to(mass.dtype)[:, :, None]
    divisor = mass_of(tiles.problem.marginals.log_row_mass).to(mass.dtype)
    if tiles.problem.solver.rho_row == 1:
        divisor = torch.where(row_sums > 0, row_sums, divisor)
    return mass / divisor[..., None]


def marginal_errors(tiles: AugmentedPlan, scale: MassScale | None = None) -> tuple[Tensor, Tensor]:
    """(P 1 - a, P^T 1 - b), augmented: `[N, H, L(+G)]`, `[N, H, S(+G)]`; in the caller's unit of mass, given the
    problem's."""
    sums = tiles.row_pass(torch.ones_like(tiles.v)), tiles.column_pass(torch.ones_like(tiles.u))
    masses = tiles.log_a.exp(), tiles.log_b.exp()
    if scale is not None:
        sums = scale.of_plan(sums[0]), scale.of_plan(sums[1])
        masses = scale.of_mass(masses[0]), scale.of_mass(masses[1])
    return sums[0] - masses[0], sums[1] - masses[1]


class TiledPasses(AdjointPasses):
    """The passes of the adjoint over tiles, gathering the cotangents of value, key, query and mask."""

    def __init__(self, tiles: Tiles, output: Tensor, grads: OutputGrads):
        super().__init__(tiles)
        self.tiles, self.wants_mask = tiles, grads.mask
        self.d = OutputCotangent(tiles, output, grads)
        self.row_sums, self.bins = self.d.row_sums, self.d.bins

    grad_value: Tensor | None = None  # per query head, [N, H, S, Ev]
    grad_key: Tensor | None = None  # per query head, [N, H, S, E]
    deferred_key: Tensor | None = None
    grad_query: Tensor | None = None
    grad_mask: Tensor | None = None

    def score_cotangent(self, field: Field, i: int, j: int) -> Tensor:
        """dS on a tile."""
        return self.tiles.score_cotangent(self.d.grad, field, i, j)

    def column(self, x: Tensor, factor: Factor, field: Field | None = None, deferred: Factor | None = None) -> Tensor:
        """factor^T x; dV rides in the first pass, dK (all but the `deferred` factor) in the one with a field."""
        t = self.tiles
        first = self.gathers_value and self.grad_value is None
        if not first and field is None:
            return t.column_pass(x, factor)
        scaled = factor.scaled
        inner = x * factor.row.exp() if scaled else x
        out = x.new_zeros(t.num, t.heads, t.size)
        value = x.new_zeros(t.num, t.heads, t.size, self.d.grad.shape[-1]) if first else None
        key, later = (
            None if gathered is None else x.new_zeros(t.num, t.heads, t.size, t.inputs.query.shape[-1])
            for gathered in (field, deferred)
        )
        for i, rows in enumerate(t.row_blocks):
            query = t.inputs.query[..., rows, :].to(t.dtype)
            for j in t.columns(i):
                cols, plan = t.col_blocks[j], t.plan(i, j)
                out[..., cols] += (inner[..., None, rows] @ (plan if scaled else t.factor(factor, i, j)))[..., 0, :]
                if value is not None:
                    value[..., cols, :] += t.dropped_out(plan, i, j).transpose(-1, -2) @ self.d.grad[..., rows, :]
                if key is not None and field is not None:
                    key[..., cols, :] += self.score_cotangent(field, i, j).transpose(-1, -2) @ query
                if later is not None and deferred is not None:
                    if deferred.scaled:  # its column exponentials come with the field's column terms
                        part = plan.transpose(-1, -2) @ (query * deferred.row[..., rows, None].exp())
                    else:
                        part = t.factor(deferred, i, j).transpose(-1, -2) @ query
                    later[..., cols, :] += part
        self.grad_value = value if first else self.grad_value
        if field is not None:
            self.grad_key, self.deferred_key = key, later
        if scaled:
            return t.complete_cols(out, inner) * factor.col.exp()
        return t.complete_cols(out, x, factor)

    def real_column_sums(self) -> Tensor:
        """<dV_j, V_j>."""
        t = self.tiles
        assert self.grad_value is not None and t.inputs.value is not None
        return (t.by_group(self.grad_value) * t.per_head(t.inputs.value)).sum(-1).flatten(1, 2)

    def row(self, y: Tensor, factor: Factor, field: Field | None = None) -> Tensor:
        """factor y; with the whole field, dQ and dmask ride along and dK is completed by its deferred factor."""
        t = self.tiles
        if field is None:
            return t.row_pass(y, factor)
        scaled = factor.scaled
        inner = y * factor.col.exp() if scaled else y
        out = y.new_zeros(t.num, t.heads, t.length)
        self.grad_query = y.new_zeros(t.inputs.query.shape)
        mask = t.inputs.mask
        if mask is not None and self.wants_mask:
            self.grad_mask = y.new_zeros(mask.shape)
        for i, rows in enumerate(t.row_blocks):
            for j in t.columns(i):
                cols = t.col_blocks[j]
                tile = t.plan(i, j) if scaled else t.factor(factor, i, j)
                out[..., rows] += (tile @ inner[..., cols, None])[..., 0]
                grad_scores = self.score_cotangent(field, i, j)
                self.grad_query[..., rows, :] += t.times_key(grad_scores, cols)
                if self.grad_mask is not None:
                    t.add_to_mask(self.grad_mask, grad_scores, rows, cols)
        if self.deferred_key is not None:
            assert self.grad_key is not None
            self.grad_key = self.grad_key - field.col_terms[..., : t.size, -1, None] * self.deferred_key
        if scaled:
            return t.complete_rows(out, inner) * factor.row.exp()
        return t.complete_rows(out, y, factor)

    def gathered(self, field: Field) -> Inputs:
        t, solver = self.tiles, self.tiles.problem.solver
        assert self.grad_query is not None and self.grad_key is not None
        factor = solver.scale / solver.epsilon
        value = None if self.grad_value is None else t.by_group(self.grad_value).sum(2)
        return Inputs(self.grad_query * factor, t.by_group(self.grad_key).sum(2) * factor, value, self.grad_mask)
