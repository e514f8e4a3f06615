"""Derivatives beyond the first, and forward mode, for the engines whose backward is derived by hand.

What an engine's backward returns is the gradient of a surrogate: the R last iterations (all T + R when unrolled) from
potentials that are held constant. The reference computes that surrogate too, started from the duals the forward saved,
and autograd differentiates it any number of times. So first derivatives come from the engine, and only those beyond,
which are asked for rarely, are taken densely: L x S memory, R iterations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from torch_sinkhorn_attn.method import reference
from torch_sinkhorn_attn.method.implicit import FIRST_ONLY
from torch_sinkhorn_attn.problem.problem import Inputs, Potentials, Problem, compute_dtype, full_precision

Tensors = tuple[Tensor, ...]
PlanName = Literal["plan", "log_plan"]
What = Literal["attention"] | PlanName


class Surrogate:
    """A function whose derivatives of every order are those of the engine's result.

    Maps the inputs that are present and floating (`names`; `primals` in the compute dtype) to the output and, with a
    dustbin, the masses sent to and from it; or to the plan alone, or its logarithm. `mask` says whether a float mask is
    among them.
    """

    def __init__(self, inputs: Inputs, problem: Problem, potentials: Potentials, what: What, mask: bool = True):
        if problem.solver.gradient == "implicit":
            raise RuntimeError(FIRST_ONLY)
        self.names = [
            name
            for name, x in inputs._asdict().items()
            if x is not None and x.is_floating_point() and (mask or name != "mask")
        ]
        dtype = compute_dtype(inputs.query.dtype)
        self.given, self.what = inputs, what
        self.primals: Tensors = tuple(getattr(inputs, name).to(dtype) for name in self.names)
        tail = replace(problem.solver, base_iters=0, tail_iters=problem.solver.kept, gradient="tail")
        self.problem = replace(problem, initial_row=potentials.row[0], initial_col=potentials.col[0], solver=tail)

    def __call__(self, *primals: Tensor) -> Tensors:
        inputs = self.given._replace(**dict(zip(self.names, primals, strict=True)))
        with full_precision(self.given.query.device):
            if self.what != "attention":
                return (reference.plan(inputs, self.problem, log=self.what == "log_plan")[0],)
            result = reference.forward(inputs, self.problem)
        if self.problem.has_dustbin:
            return result.output, result.row_dustbin, result.col_dustbin
        return (result.output,)

    def cotangents(self, given: Sequence[Tensor | None]) -> Tensors:
        """Those given, with zeros for the dustbin's masses where there are none given but a dustbin."""
        first = given[0]
        assert first is not None
        if self.what != "attention" or not self.problem.has_dustbin:
            return (first,)
        masses = self.problem.marginals.log_row_mass, self.problem.marginals.log_col_mass
        return first, *or_zeros(given[1:], [x.to(first.dtype) for x in masses])

    def gradients(self, *arguments: Tensor) -> Tensors:
        """Cotangents of the primals, as a function of (primals, cotangents of the results)."""
        count = len(self.primals)
        return pullback(self, arguments[:count], arguments[count:])


def pullback(function: Callable[..., Tensors], primals: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Tensors:
    """J^T c, differentiable again."""
    with torch.enable_grad():
        _, pull = torch.func.vjp(function, *primals)
        return tuple(pull(tuple(cotangents)))


def pushforward(function: Callable[..., Tensors], primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensors:
    """J t, as the derivative of c -> J^T c along t: forward mode by reverse mode alone, which nests anywhere."""
    with torch.enable_grad():
        results, pull = torch.func.vjp(function, *primals)
        _, push = torch.func.vjp(lambda *c: tuple(pull(c)), *(torch.zeros_like(x) for x in results))
        return tuple(push(tuple(tangents)))


def or_zeros(given: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensors:
    """Missing tangents or cotangents as zeros, the others in the dtype they belong to."""
    return tuple(torch.zeros_like(y) if x is None else x.to(y.dtype) for x, y in zip(given, like, strict=True))
