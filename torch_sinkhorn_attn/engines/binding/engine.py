"""An engine over a binding: what a module of `engines.ENGINES` offers, each function with the binding in front."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from torch_sinkhorn_attn.engines.tiled import engine as tiled
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
from torch_sinkhorn_attn.problem.problem import Gradients, Inputs, OutputGrads, Potentials, Problem, Result

Tensors = dict[str, Tensor | None]  # by name; an absent one is None


class Binding(Protocol):
    """What is asked of a library of TPU tensors; a module can be one."""

    def platform(self) -> str:
        """JAX's name for the platform of its device."""

    def lowering(self) -> Lowering:
        """`program.lowering` of its device."""

    def run(
        self,
        function: Callable[..., dict[str, Any]],
        trees: tuple[Tensors, ...],
        statics: dict[str, Any],
        output: Tensor | None = None,
    ) -> Tensors:
        """`function(*trees, **statics)` of `functions`, with tensors in the places of arrays; `output`, where there is
        one already, lies where the results shall."""


def absence(libraries: tuple[str, ...], remedy: str) -> str | None:
    """What is not installed, and how it is; None if all is. Nothing is imported to find out."""
    absent = [name for name in libraries if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed: {remedy}"


def versions(libraries: tuple[str, ...]) -> str:
    """What is installed."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)


def refusal(binding: Binding, inputs: Inputs) -> str | None:
    """Why tensors that are its own cannot be computed: a TPU has no float64."""
    if inputs.query.dtype == torch.float64 and binding.platform() == "tpu":
        return "a TPU has no float64: use float32"
    return None


def _statics(binding: Binding, problem: Problem) -> dict[str, Any]:
    from torch_sinkhorn_attn.engines.binding import program

    return {"statics": program.statics(problem), "lowering": binding.lowering()}


def solve(binding: Binding, inputs: Inputs, problem: Problem) -> Potentials:
    """T stopped and R kept iterations: the stacked duals."""
    from torch_sinkhorn_attn.engines.binding import functions, program

    found = binding.run(functions.solve, program.arrays(inputs, problem), _statics(binding, problem))
    return Potentials(_given(found["row_potentials"]), _given(found["col_potentials"]))


def forward(binding: Binding, inputs: Inputs, problem: Problem, residuals: bool) -> Result:
    """Output, duals and (unless `residuals` is False: NaN) the marginal residuals."""
    from torch_sinkhorn_attn.engines.binding import functions, program
    from torch_sinkhorn_attn.engines.tpu.method import problem as tpu

    statics = {**_statics(binding, problem), "residuals": residuals}
    found = binding.run(functions.forward, program.arrays(inputs, problem), statics)
    output, row, col, row_residual, col_residual = (_given(found.get(name)) for name in tpu.Result._fields[:5])
    absent = output.new_empty(0)
    bins = [absent if found.get(name) is None else found[name] for name in tpu.Result._fields[5:]]
    return Result(output, Potentials(row, col), row_residual, col_residual, *bins)  # type: ignore[arg-type]


def backward(
    binding: Binding, inputs: Inputs, problem: Problem, output: Tensor, potentials: Potentials, grads: OutputGrads
) -> Gradients:
    """The adjoint, on the devices that have the output."""
    from torch_sinkhorn_attn.engines.binding import functions, program

    given = {
        "output": output,
        "row_potentials": potentials.row,
        "col_potentials": potentials.col,
        "grad_output": grads.output.to(output.dtype),
        "grad_to_bin": grads.to_bin,
        "grad_from_bin": grads.from_bin,
    }
    trees = *program.arrays(inputs, problem), given
    found = binding.run(functions.backward, trees, {**_statics(binding, problem), "mask_grad": grads.mask}, output)
    dropped = _given(found.pop("dropped"))
    return Gradients(Inputs(**found), dropped)  # type: ignore[arg-type]


def _given(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def plan(binding: Binding, inputs: Inputs, problem: Problem) -> tuple[Tensor, Potentials]:
    """The plan `[N, H, L, S]`, or `[N, H, L+1, S+1]` with a dustbin, and the stacked duals."""
    potentials = solve(binding, inputs._replace(value=None), problem)
    return tiled.plan_of(inputs, problem, potentials), potentials


plan_backward = tiled.plan_backward
