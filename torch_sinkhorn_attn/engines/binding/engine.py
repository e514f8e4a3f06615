"""The engines that run the JAX programs of `engines/tpu` on tensors of another library than torch itself."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_sinkhorn_attn.engines.base import Engine
from torch_sinkhorn_attn.engines.binding.library import Binding, Tensors
from torch_sinkhorn_attn.problem.problem import Gradients, Inputs, OutputGrads, Potentials, Problem, Result


class BoundEngine(Engine):
    """An engine over a binding. The modules that import JAX and the library wait for its first problem.

    Attributes:
        libraries: the packages it needs, the one whose tensors it takes first.
        remedy: how they are installed.
        tensors: what its tensors are called.
        way_there: how query becomes one.
        kernels: what runs where, for `status`.
        missing: what is not installed, and how it is; None if all is.
    """

    compiles = True
    libraries: tuple[str, ...]
    remedy: str
    tensors: str
    way_there: str
    kernels: str

    def __init__(self) -> None:
        self.wrappers = self.libraries[:1]
        self.missing = absence(self.libraries, self.remedy)

    @abstractmethod
    def binding(self) -> Binding:
        """Its library, imported."""

    def status(self) -> str:
        if self.missing is not None:
            return f"missing: {self.missing}"
        versions = (f"{name} {importlib.metadata.version(name)}" for name in self.libraries)
        return f"{', '.join(versions)}: {self.kernels}"

    def refusal(self, inputs: Inputs, problem: Problem) -> str | None:
        """The tensors are elsewhere, something is missing, or it is a float64 one on a TPU."""
        device = inputs.query.device.type
        if device != self.device:
            return f"it runs on {self.tensors}, and query is on {device}: {self.way_there}"
        if self.missing is not None or torch.compiler.is_compiling():
            return self.missing
        if inputs.query.dtype == torch.float64 and self.binding().platform() == "tpu":
            return "a TPU has no float64: use float32"
        return None

    def solve(self, inputs: Inputs, problem: Problem) -> Potentials:
        from torch_sinkhorn_attn.engines.binding import functions

        found = self._run(functions.solve, inputs, problem)
        return Potentials(_given(found["row_potentials"]), _given(found["col_potentials"]))

    def forward(self, inputs: Inputs, problem: Problem, residuals: bool = True) -> Result:
        from torch_sinkhorn_attn.engines.binding import functions
        from torch_sinkhorn_attn.engines.tpu.method import problem as tpu

        found = self._run(functions.forward, inputs, problem, residuals=residuals)
        output, row, col, row_residual, col_residual = (_given(found.get(name)) for name in tpu.Result._fields[:5])
        absent = output.new_empty(0)
        bins = [absent if found.get(name) is None else found[name] for name in tpu.Result._fields[5:]]
        return Result(output, Potentials(row, col), row_residual, col_residual, *bins)  # type: ignore[arg-type]

    def backward(
        self, inputs: Inputs, problem: Problem, output: Tensor, potentials: Potentials, grads: OutputGrads
    ) -> Gradients:
        """The adjoint, on the devices that have the output."""
        from torch_sinkhorn_attn.engines.binding import functions

        given = {
            "output": output,
            "row_potentials": potentials.row,
            "col_potentials": potentials.col,
            "grad_output": grads.output.to(output.dtype),
            "grad_to_bin": grads.to_bin,
            "grad_from_bin": grads.from_bin,
        }
        found = self._run(functions.backward, inputs, problem, given, output=output, mask_grad=grads.mask)
        dropped = _given(found.pop("dropped"))
        return Gradients(Inputs(**found), dropped)  # type: ignore[arg-type]

    def _run(
        self,
        function: Callable[..., dict[str, Any]],
        inputs: Inputs,
        problem: Problem,
        *given: Tensors,
        output: Tensor | None = None,
        **options: bool,
    ) -> Tensors:
        from torch_sinkhorn_attn.engines.binding import program

        binding = self.binding()
        statics = {"statics": program.statics(problem), "lowering": binding.lowering(), **options}
        return binding.run(function, (*program.arrays(inputs, problem), *given), statics, output)


def absence(libraries: tuple[str, ...], remedy: str) -> str | None:
    """What is not installed, and how it is; None if all is. Nothing is imported to find out."""
    absent = [name for name in libraries if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed: {remedy}"


def _given(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
