"""A lowering of the pure JAX half as an engine of the torch half, on CPU tensors: for the conformance suite."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from torch_sinkhorn_attn.engines.base import Engine
from torch_sinkhorn_attn.engines.tpu.method import problem as tpu, run
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
from torch_sinkhorn_attn.engines.tpu.releases import enable_x64
from torch_sinkhorn_attn.problem.problem import LEAF, Gradients, Inputs, OutputGrads, Potentials, Problem, Result


def to_jax(x: Tensor | None) -> jax.Array | None:
    """A CPU tensor as a JAX array; int64 becomes int32, as the kernels take it."""
    if x is None:
        return None
    x = x.detach()
    if x.dtype == torch.bfloat16:
        return jnp.asarray(x.float().numpy()).astype(jnp.bfloat16)
    return jnp.asarray(np.asarray(x.to(torch.int32) if x.dtype == torch.int64 else x))


def to_torch(x: jax.Array | None) -> Tensor | None:
    return None if x is None else torch.from_numpy(np.array(x))


def inputs_of(inputs: Inputs) -> tpu.Inputs:
    return tpu.Inputs(*(to_jax(x) for x in inputs))


def constants_of(problem: Problem) -> tpu.Constants:
    """The tensors of a problem."""
    beside = ("dropout_seed", "head_index")
    given = {name: to_jax(LEAF[name](problem)) for name in tpu.Constants._fields if name not in beside}
    seed = problem.dropout_seed
    given["dropout_seed"] = None if seed is None else jnp.asarray(seed.numpy().astype(np.uint32))
    return tpu.Constants(**given)


def statics_of(problem: Problem) -> tpu.Statics:
    s, o = problem.solver, problem.outline
    return tpu.Statics(
        scale=s.scale, epsilon=s.epsilon, rho_row=s.rho_row, rho_col=s.rho_col, stopped=s.stopped, kept=s.kept,
        tolerance=s.tolerance, over_relaxation=s.over_relaxation, acceleration=s.acceleration,
        contraction=s.contraction, implicit=s.gradient == "implicit",
        dropout_p=s.dropout_p, banded=o.banded, window_left=o.window_left, window_right=o.window_right,
        uniform=o.uniform,
    )  # fmt: skip


class Kernels(Engine):
    """The kernels of a lowering."""

    def __init__(self, lowering: Lowering, name: str = "jax", **options: Any):
        self.name, self.lowering, self.compiler_options = name, lowering, options

    def status(self) -> str:
        return f"{self.lowering.shape}, for tests"

    def refusal(self, inputs: Inputs, problem: Problem) -> str | None:
        return None

    def _call(self, function: Any, inputs: Inputs, problem: Problem, *arguments: Any, **static: Any) -> Any:
        statics = statics_of(problem)

        def compute(inputs: tpu.Inputs, constants: tpu.Constants, *arguments: Any) -> Any:
            return function(inputs, constants, statics, self.lowering, *arguments, **static)

        with enable_x64(inputs.query.dtype == torch.float64):
            compiled = jax.jit(compute, compiler_options=self.compiler_options or None)
            return compiled(inputs_of(inputs), constants_of(problem), *(to_jax(x) for x in arguments))

    def solve(self, inputs: Inputs, problem: Problem) -> Potentials:
        return Potentials(*(to_torch(x) for x in self._call(run.solve, inputs, problem)))

    def forward(self, inputs: Inputs, problem: Problem, residuals: bool = True) -> Result:
        found = self._call(run.forward, inputs, problem, residuals=residuals)
        output, row, col, *errors, to_bin, from_bin = (to_torch(x) for x in found)
        empty = torch.zeros(0, dtype=row.dtype)
        bins = (empty, empty.clone()) if to_bin is None else (to_bin, from_bin)
        return Result(output, Potentials(row, col), *errors, *bins)

    def backward(
        self, inputs: Inputs, problem: Problem, output: Tensor, potentials: Potentials, grads: OutputGrads
    ) -> Gradients:
        arguments = (output, potentials.row, potentials.col, grads.output, grads.to_bin, grads.from_bin)
        found, dropped = self._call(run.backward, inputs, problem, *arguments, mask_grad=grads.mask)
        return Gradients(Inputs(*(to_torch(x) for x in found)), to_torch(dropped))


def without_streaming(monkeypatch: Any, *modules: Any) -> list[Any]:
    """The kernels' own results from now on, whatever the data, in modules that choose by `resident_or_streamed`: else
    the streaming ones would cover for them. The list fills with whether the data suited them."""
    suited: list[Any] = []

    def own(fits: Any, kernels: Any, streamed: Any) -> Any:
        jax.debug.callback(lambda x: suited.append(bool(x)), fits)
        return kernels()

    for module in modules:
        monkeypatch.setattr(module, "resident_or_streamed", own)
    return suited
