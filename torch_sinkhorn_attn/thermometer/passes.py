"""Half-steps, iterates and products with the plan, by the verbs that every engine has: nothing dense, no tiles in
Python where the engine needs none.

A warm start with a tail of K iterations gives K plain iterates in one call. A call without any iteration, warm-started
at (u, v), gives P X / a for many vectors X at once, as its value: its one row half-step finds u again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torch_sinkhorn_attn.engines import ENGINES, REFERENCE, choose, engine_of
from torch_sinkhorn_attn.engines.base import each_tensor
from torch_sinkhorn_attn.method import reference
from torch_sinkhorn_attn.method.dustbin_vectors import DustbinVectors
from torch_sinkhorn_attn.options import Solver
from torch_sinkhorn_attn.problem.arguments import Prepared
from torch_sinkhorn_attn.problem.feasibility.parts import masked_components
from torch_sinkhorn_attn.problem.problem import Inputs, Potentials, Problem, Result, compute_dtype
from torch_sinkhorn_attn.problem.segments import Components, mass_of, segment_max, segments

PLAIN: dict[str, Any] = {
    "base_iters": 0, "gradient": "tail", "tolerance": 0.0, "over_relaxation": 1.0, "acceleration": None,
    "contraction": 0.0,
}  # fmt: skip


class Passes:
    """Problems and the engine that solves them. Vectors are augmented: u `[N, H, L(+G)]`, v `[N, H, S(+G)]`."""

    def __init__(self, engine: str, inputs: Inputs, problem: Problem):
        self.engine, self.inputs, self.problem = engine, inputs._replace(value=None, dustbin_value=None), problem
        self.dtype = compute_dtype(inputs.query.dtype)
        self.log_a, self.log_b = (x.to(self.dtype) for x in problem.marginals.augmented)
        self.own = segments(problem)

    def solve(self, u: Tensor | None = None, v: Tensor | None = None, **solver: Any) -> Potentials:
        """The problem with these numbers of its solver, from (u, v), or from its own start where both are None."""
        problem = self._problem(u, v, solver)
        if self.engine == REFERENCE:
            return reference.plan_and_potentials(reference.dense_problem(self.inputs, problem), problem)[1]
        return ENGINES[self.engine].solve(self.inputs, problem)

    def iterates(self, u: Tensor, v: Tensor, count: int) -> Potentials:
        """(u, v) and the `count` plain iterates that follow it, stacked."""
        return self.solve(u, v, **PLAIN, tail_iters=count)

    def start(self) -> tuple[Tensor, Tensor]:
        """The problem's own (u^0, v^0)."""
        given = (self.problem.initial_row, self.log_a), (self.problem.initial_col, self.log_b)
        u, v = (
            (torch.zeros_like(log_mass) if x is None else x.to(self.dtype)).masked_fill(log_mass == -torch.inf, 0.0)
            for x, log_mass in given
        )
        return u, v

    def column(self, u: Tensor) -> Tensor:
        """v, the plain column half-step from u."""
        return self.iterates(u, torch.zeros_like(self.log_b), 1).col[1]

    def row(self, v: Tensor) -> Tensor:
        """u, the plain row half-step from v."""
        return self.solve(torch.zeros_like(self.log_a), v, **PLAIN, tail_iters=0).row[0]

    def times(self, v: Tensor, x: Tensor) -> Tensor:
        """P x, `[K, N, H, L(+G)]`, of K vectors `[K, N, H, S(+G)]`, P the plan of v and its row half-step u."""
        inputs, num_bins = self._wide(), self.problem.num_dustbins
        size = self.log_b.shape[-1] - num_bins
        value = x[..., :size].movedim(0, -1).contiguous()
        problem = self._problem(torch.zeros_like(self.log_a), v, {**PLAIN, "tail_iters": 0})
        result = self._forward(inputs._replace(value=value), problem)
        mass = mass_of(self.problem.marginals.log_row_mass).to(self.dtype)
        real = result.output.movedim(-1, 0) * mass
        if not num_bins:
            return real
        vectors = DustbinVectors(inputs, self.problem, self.problem.solver.epsilon, self.dtype)
        live = (
            y.masked_fill(log_mass == -torch.inf, -torch.inf)
            for y, log_mass in ((result.potentials.row[0], self.log_a), (v, self.log_b))
        )
        plan = each_tensor(vectors.log_plan(*live), torch.exp)
        return vectors.complete_rows(real, plan, x)

    def parts(self) -> Components:
        """The connected component of each line, by the intervals and the mask."""
        return masked_components(self.inputs, self.problem)

    def movement(self, v: Tensor, plain: Tensor) -> Tensor:
        """The largest |plain - v| of each problem `[N, H, G]`, where `plain` is the column half-step that follows v:
        balanced, its largest relative column error |log(column sum / b_j)|."""
        change = (plain - v).abs().masked_fill(self.log_b == -torch.inf, 0.0)
        return segment_max(change, self.own.col, self.own.number).clamp(min=0)

    def at(self, n: int, h: int) -> Passes:
        """Those of one batch element and head."""
        inputs, problem = self.inputs, self.problem
        group = inputs.query.shape[1] // inputs.key.shape[1]

        def element(x: Tensor) -> Tensor:
            return x[n : n + 1] if x.shape[0] > 1 else x

        def one(x: Tensor) -> Tensor:
            return element(x)[:, h : h + 1] if x.shape[1] > 1 else element(x)

        part = each_tensor(inputs, one)._replace(key=element(inputs.key)[:, h // group : h // group + 1])
        row, col = (None if x is None else one(x) for x in (problem.initial_row, problem.initial_col))
        support, marginals = each_tensor(problem.support, element), each_tensor(problem.marginals, one)
        return Passes(self.engine, part, Problem(support, marginals, row, col, None, problem.solver, problem.outline))

    def _problem(self, u: Tensor | None, v: Tensor | None, solver: dict[str, Any]) -> Problem:
        changed: Solver = replace(self.problem.solver, **{"dropout_p": 0.0, **solver})
        if u is None or v is None:
            return replace(self.problem, solver=changed, dropout_seed=None)
        start = u.contiguous(), v.contiguous()
        return replace(self.problem, solver=changed, initial_row=start[0], initial_col=start[1], dropout_seed=None)

    def _wide(self) -> Inputs:
        """In the compute dtype, with a key for each query head, as products with vectors of their own need."""
        inputs = self.inputs
        group = inputs.query.shape[1] // inputs.key.shape[1]
        key = inputs.key if group == 1 else inputs.key.repeat_interleave(group, 1)
        return inputs._replace(query=inputs.query.to(self.dtype), key=key.to(self.dtype))

    def _forward(self, inputs: Inputs, problem: Problem) -> Result:
        if self.engine == REFERENCE:
            return reference.forward(inputs, problem)
        return ENGINES[self.engine].forward(inputs, problem, residuals=False)


def passes_of(prepared: Prepared) -> Passes:
    """By the engine that the call takes; where every computation is compiled, by one of the CPU."""
    inputs, problem = prepared.inputs, prepared.problem
    engine, home = choose(prepared.engine, inputs, problem), engine_of(inputs.query.device)
    inputs, problem = home.fetched((inputs, problem))
    return Passes(choose(None, inputs, problem) if home.compiles else engine, inputs, problem)


def solved(prepared: Prepared, more: bool = False) -> tuple[Passes, Inputs, Potentials]:
    """The potentials that the call's own engine finds, with all of them where data may be looked at. `more`: by one
    tail iteration more, unless there is no tail, or the engine would compile another program for it."""
    inputs, problem = prepared.inputs, prepared.problem
    home, tail = engine_of(inputs.query.device), problem.solver.tail_iters
    first = Passes(choose(prepared.engine, inputs, problem), inputs, problem)
    further = more and problem.solver.kept > 0 and not home.compiles
    potentials = first.solve(tail_iters=tail + 1) if further else first.solve()
    fetched, potentials = home.fetched((inputs, potentials))
    return passes_of(prepared), fetched, potentials
