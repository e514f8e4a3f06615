"""The tiled engine: the schedule of the definition over row and column blocks, in plain PyTorch, on any device.

Between forward and backward only the inputs, the output and the duals live: O(n + m) numbers per head. Temporaries are
a few tiles, never an n x m tensor, and only the tiles the support can touch are read. The dustbin is two vectors beside
the tiles. float16 and bfloat16 inputs are widened tile by tile; potentials and sums are float32 (float64 for float64).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn.engines.base import Engine
from torch_sinkhorn_attn.engines.tiled.dustbin_plan import DustbinPlan
from torch_sinkhorn_attn.engines.tiled.tiles import Tiles
from torch_sinkhorn_attn.method.dustbin_vectors import Vectors
from torch_sinkhorn_attn.method.reference import stopped_base
from torch_sinkhorn_attn.method.staircase import Factor, Field, implicit_field, tail_field
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


def attend(scores: Tiles, residuals: bool) -> Result:
    """Forward over the tiles of the scores."""
    potentials = iterate(scores)
    u, v = potentials.row[-1], potentials.col[-1]
    tiles = scores.at(u, v)
    to_bin, from_bin, _ = tiles.dustbin_plan
    if residuals:
        row_residual, col_residual = (largest(x) for x in marginal_errors(tiles))
    else:
        row_residual, col_residual = (u.new_full(u.shape[:2], torch.nan) for _ in range(2))
    return Result(attention_output(tiles), potentials, row_residual, col_residual, to_bin, from_bin)


def iterate(tiles: Tiles) -> Potentials:
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


def attention_output(tiles: Tiles) -> Tensor:
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


def marginal_errors(tiles: Tiles, scale: MassScale | None = None) -> tuple[Tensor, Tensor]:
    """(P 1 - a, P^T 1 - b), augmented: `[N, H, L(+G)]`, `[N, H, S(+G)]`; in the caller's unit of mass, given the
    problem's."""
    sums = tiles.row_pass(torch.ones_like(tiles.v)), tiles.column_pass(torch.ones_like(tiles.u))
    masses = tiles.log_a.exp(), tiles.log_b.exp()
    if scale is not None:
        sums = scale.of_plan(sums[0]), scale.of_plan(sums[1])
        masses = scale.of_mass(masses[0]), scale.of_mass(masses[1])
    return sums[0] - masses[0], sums[1] - masses[1]


class Cotangent(NamedTuple):
    """D = dL/dP: <grad_i, V_j> (dropped out) on real pairs and a vector each for the dustbin column and row."""

    grad: Tensor  # dO / a, [N, H, L, Ev]
    to_bin: Tensor | None  # [N, H, L]
    from_bin: Tensor | None  # [N, H, S]


class TiledPasses:
    """The passes of `staircase.tail_field` over tiles, gathering the cotangents of value, key, query and mask."""

    may_scale = True
    gathers_value = True

    def __init__(self, tiles: Tiles, output: Tensor, grads: OutputGrads):
        self.tiles, self.wants_mask = tiles, grads.mask
        problem, inputs = tiles.problem, tiles.inputs
        inactive = problem.marginals.log_row_mass == -torch.inf
        grad_output = grads.output.to(tiles.dtype).masked_fill(inactive[..., None], 0.0)
        self.row_sums = (grad_output * output).sum(-1)  # rowsum(P*D) without a pass
        grad = grad_output / mass_of(problem.marginals.log_row_mass)[..., None]
        self.d = Cotangent(grad, None, None)
        if tiles.dustbin is not None:
            to_bin, from_bin, _ = tiles.dustbin_plan
            grad_to, grad_from = (
                torch.zeros_like(p) if g is None else g.to(tiles.dtype)
                for g, p in ((grads.to_bin, to_bin), (grads.from_bin, from_bin))
            )
            read = grad_to
            if inputs.dustbin_value is not None:
                read = grad_to + (grad * inputs.dustbin_value.to(tiles.dtype)[:, :, None]).sum(-1)
            self.d = Cotangent(grad, read, grad_from)
            self.row_sums = torch.cat(
                [self.row_sums + to_bin * grad_to, tiles.dustbin.sum_cols(from_bin * grad_from)], -1
            )

    grad_value: Tensor | None = None  # per query head, [N, H, S, Ev]
    grad_key: Tensor | None = None  # per query head, [N, H, S, E]
    deferred_key: Tensor | None = None
    grad_query: Tensor | None = None
    grad_mask: Tensor | None = None

    def score_cotangent(self, field: Field, i: int, j: int) -> Tensor:
        """dS on a tile."""
        return self.tiles.score_cotangent(self.d.grad, field, i, j)

    def dustbin_cotangent(self, dustbin: DustbinPlan, field: Field) -> Vectors:
        """dS on the dustbin's column, row and corner."""
        assert self.d.to_bin is not None and self.d.from_bin is not None
        return dustbin.score_cotangent(self.tiles.log_dustbin_plan, self.d.to_bin, self.d.from_bin, field)

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

    def column_sums(self) -> Tensor:
        """<dV_j, V_j> and the dustbin's part."""
        t = self.tiles
        assert self.grad_value is not None and t.inputs.value is not None
        sums = t.complete_sums((t.by_group(self.grad_value) * t.per_head(t.inputs.value)).sum(-1).flatten(1, 2))
        if t.dustbin is None or self.d.to_bin is None or self.d.from_bin is None:
            return sums
        to_bin, from_bin, _ = t.dustbin_plan
        return torch.cat([sums + from_bin * self.d.from_bin, t.dustbin.sum_rows(to_bin * self.d.to_bin)], -1)

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


def adjoint_field(passes: TiledPasses, potentials: Potentials) -> tuple[Field, Tensor]:
    """The modifier field and the dropped cotangent, by all passes of the adjoint."""
    tiles, problem = passes.tiles, passes.tiles.problem
    if problem.solver.gradient != "implicit":
        return tail_field(passes, potentials, problem)
    zero = Factor(torch.zeros_like(tiles.u), torch.zeros_like(tiles.v), scaled=True)
    if passes.gathers_value:
        passes.column(zero.row, zero)
    sums = passes.row_sums, passes.column_sums()
    field = implicit_field(tiles, *sums, problem, tiles.parts, tiles.own)
    passes.column(zero.row, zero, field)
    passes.row(zero.col, zero, field)
    return field, zero.row


def gradients(passes: TiledPasses, potentials: Potentials) -> Gradients:
    """The adjoint, from its passes."""
    field, dropped = adjoint_field(passes, potentials)
    found = score_gradients(passes, field)
    t = passes.tiles
    assert passes.grad_value is not None
    dustbin_value = None
    if t.inputs.dustbin_value is not None:
        dustbin_value = (t.dustbin_plan[0][..., None] * passes.d.grad).sum(-2)
    return Gradients(found._replace(value=t.by_group(passes.grad_value).sum(2), dustbin_value=dustbin_value), dropped)


def score_gradients(passes: TiledPasses, field: Field) -> Inputs:
    """Cotangents of what the scores are made of, from what the passes gathered."""
    t = passes.tiles
    assert passes.grad_query is not None and passes.grad_key is not None
    factor, epsilon = t.problem.solver.scale / t.problem.solver.epsilon, t.problem.solver.epsilon
    found = Inputs(passes.grad_query * factor, t.by_group(passes.grad_key).sum(2) * factor, None, passes.grad_mask)
    if t.dustbin is None:
        return found
    column, row, corner = passes.dustbin_cotangent(t.dustbin, field)
    return found._replace(row_score=column / epsilon, col_score=row / epsilon, corner_score=corner.sum(-1) / epsilon)
