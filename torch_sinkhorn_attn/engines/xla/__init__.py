"""The XLA engine: pure JAX programs, with Pallas kernels on a TPU, inside torch_xla's lazy graph.

This package alone imports torch_xla, and only once a tensor is on one of its devices. `engines/tpu` holds the programs,
which JAX users may call. `set_lowering` chooses among the kernels; `spmd.sharding` says how tensors lie on several
devices, where their annotations do not.

torch's autograd counts the devices at the first backward of a process: where that may be one on the CPU, call
`torch_xla.device()` before it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

import torch
from torch import Tensor

from torch_sinkhorn_attn.engines import tiled
from torch_sinkhorn_attn.engines.traits import Traits
from torch_sinkhorn_attn.engines.xla import tensors
from torch_sinkhorn_attn.engines.xla.settings import Settings, lowering, set_lowering
from torch_sinkhorn_attn.problem import Gradients, Inputs, OutputGrads, Potentials, Problem, Result

__all__ = [
    "NAME",
    "TRAITS",
    "Settings",
    "backward",
    "forward",
    "lowering",
    "plan",
    "plan_backward",
    "refusal",
    "set_lowering",
    "solve",
    "status",
]

NAME = "xla"
TRAITS = Traits(NAME, True, ("torch_xla",), tensors.inside_op, tensors.placed, tensors.fetched)


def _absence() -> str | None:
    """What is not installed, and how it is; None if all is. Nothing is imported to find out."""
    absent = [name for name in ("torch_xla", "jax") if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return (
        f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed: "
        "pip install 'torch_sinkhorn_attn[tpu]' (Linux on x86_64, Python 3.11 or later)"
    )


_missing = _absence()


def status() -> str:
    """Whether it can run, and how; or why not."""
    if _missing is not None:
        return f"missing: {_missing}"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch_xla", "jax"))
    return f"{versions}: Pallas kernels on TPUs, plain XLA on other XLA devices"


def refusal(inputs: Inputs, problem: Problem) -> str | None:
    """Why this engine cannot run the problem: the tensors are elsewhere, something is missing, or it is a float64 one
    on a TPU."""
    device = inputs.query.device.type
    if device != TRAITS.device:
        return f"it runs on XLA tensors, and query is on {device}: query.to(torch_xla.device())"
    if _missing is not None:
        return _missing
    if inputs.query.dtype == torch.float64 and not torch.compiler.is_compiling():
        from torch_sinkhorn_attn.engines.xla import binding

        if binding.platform() == "tpu":
            return "a TPU has no float64: use float32"
    return None


def solve(inputs: Inputs, problem: Problem) -> Potentials:
    """T stopped and R kept iterations: the stacked duals."""
    from torch_sinkhorn_attn.engines.xla import program, sharded, spmd

    place = spmd.placement(inputs.query)
    found = sharded.solve(*program.arrays(inputs, problem), place, **program.statics(problem, place is not None))
    return Potentials(_given(found["row_potentials"]), _given(found["col_potentials"]))


def forward(inputs: Inputs, problem: Problem, residuals: bool = True) -> Result:
    """Output, duals and (unless `residuals` is False: NaN) the marginal residuals."""
    from torch_sinkhorn_attn.engines.tpu import problem as tpu_problem
    from torch_sinkhorn_attn.engines.xla import program, sharded, spmd

    place = spmd.placement(inputs.query)
    statics = program.statics(problem, place is not None)
    found = sharded.forward(*program.arrays(inputs, problem), place, **statics, residuals=residuals)
    output, row, col, row_residual, col_residual = (_given(found[name]) for name in tpu_problem.Result._fields[:5])
    to_bin, from_bin = (found[name] for name in tpu_problem.Result._fields[5:])
    absent = output.new_empty(0)
    return Result(
        output,
        Potentials(row, col),
        row_residual,
        col_residual,
        absent if to_bin is None else to_bin,
        absent if from_bin is None else from_bin,
    )


def backward(inputs: Inputs, problem: Problem, output: Tensor, potentials: Potentials, grads: OutputGrads) -> Gradients:
    """The adjoint, on the devices that have the output."""
    from torch_sinkhorn_attn.engines.xla import program, sharded, spmd

    place = spmd.placement(inputs.query, output)
    given = {
        "output": output,
        "row_potentials": potentials.row,
        "col_potentials": potentials.col,
        "grad_output": grads.output.to(output.dtype),
        "grad_to_bin": grads.to_bin,
        "grad_from_bin": grads.from_bin,
    }
    statics = program.statics(problem, place is not None)
    found = sharded.backward(*program.arrays(inputs, problem), place, given, **statics, mask_grad=grads.mask)
    dropped = _given(found.pop("dropped"))
    return Gradients(Inputs(**found), dropped)  # type: ignore[arg-type]


def _given(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def plan(inputs: Inputs, problem: Problem) -> tuple[Tensor, Potentials]:
    """The plan `[N, H, L, S]`, or `[N, H, L+1, S+1]` with a dustbin, and the stacked duals."""
    potentials = solve(inputs._replace(value=None), problem)
    return tiled.plan_of(inputs, problem, potentials), potentials


plan_backward = tiled.plan_backward
