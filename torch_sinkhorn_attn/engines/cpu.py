"""The CPU engine: the C++ kernels of csrc/, Sinkhorn attention at matrix-vector speed.

Within one problem (batch element, head and segment) the plan's tiles are kept as absorbed exponentials (B. Schmitzer's
stabilised scaling, 2019), so that a half-step is a matrix-vector product and a row and a column half-step take one
reading of the tiles. They are workspace of the problem being solved: between forward and backward only the inputs, the
output and the duals live. Tiles beyond `workspace_budget()`, the process's one cap, are computed again in each pass.
A call on Python's main thread hears Ctrl-C within a second.

Results do not depend on the number of threads or on the budget, and are the same to the bit on a rerun. The kernels are
built for several instruction sets; `capability()` says which run here, and TORCH_SINKHORN_ATTN_CPU_CAPABILITY chooses
(default, avx2 or avx512) before the package is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_sinkhorn_attn.compat import releases
from torch_sinkhorn_attn.engines.base import Engine
from torch_sinkhorn_attn.problem.problem import (
    LEAF,
    LEAVES,
    Gradients,
    Inputs,
    OutputGrads,
    Partners,
    Potentials,
    Problem,
    Result,
    compute_dtype,
)

NAME = "cpu"
DEFAULT_BUDGET = 64 << 20
INTERFACE = 5  # as kInterface in csrc/ops.cpp; raised whenever the arguments change
MOST_PARTNERS = 16  # as kMostPartners in csrc/problem.h
INTERRUPTED = "interrupted by a signal"  # as in csrc/schedule.cpp
_FOLDER = Path(__file__).parent
_BUDGET_VARIABLE = "TORCH_SINKHORN_ATTN_CPU_WORKSPACE_MIB"
_LIBRARY = _FOLDER / "_cpu.so"
_RELEASES = _FOLDER / "_cpu_torch.txt"  # "2.9", or "2.10+": the releases of torch it is for; written by setup.py
_REASON = _FOLDER / "_cpu_missing.txt"  # written by setup.py where it could not build the kernels
# The lists of its ops, whose places csrc/checks.h names: the leaves of a problem, by type, but for the transposed
# intervals, which the kernels do without; and counts.
_TENSORS = tuple(x for _, x, kind in LEAVES if kind.startswith("Tensor") and x not in ("col_lo", "col_hi"))
_NUMBERS = tuple(x for part, x, kind in LEAVES if kind == "float")
_COUNTS = ("stopped", "kept", "implicit", "banded", "budget", "poisoned", "accelerated")


def _load() -> str | None:
    """Load the kernels; the reason if that fails."""
    if not _LIBRARY.exists():
        reason = _REASON.read_text().strip() if _REASON.exists() else "the C++ kernels were not built"
        return f"{reason}. To build them: pip install . in the source folder (needs GCC or Clang with C++20)"
    serves = _RELEASES.read_text().strip() if _RELEASES.exists() else None
    if serves is not None and not releases.among(serves):
        which = f"{serves[:-1]} and later" if serves.endswith("+") else f"{serves} alone"
        return (
            f"the C++ kernels were built for torch {which}, and this is torch {torch.__version__}. To build them for "
            "it: pip install . in the source folder (needs GCC or Clang with C++20)"
        )
    try:
        torch.ops.load_library(str(_LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"the C++ kernels do not load with torch {torch.__version__} ({error}); install the package again"
    found = getattr(torch.ops.torch_sinkhorn_attn, "cpu_interface", None)
    if found is None or found() != INTERFACE:
        return "the C++ kernels are of another version of the package; install it again"
    return None


_unavailable = _load()
_budget = 0


def capability() -> str:
    """The instruction set in use: "default", "avx2" or "avx512"; "default" is NEON on 64-bit ARM.

    Raises:
        RuntimeError: the kernels are not there, with the reason.
    """
    _require()
    return torch.ops.torch_sinkhorn_attn.cpu_capability()


def capabilities() -> list[str]:
    """Those this processor has, the narrowest vectors first."""
    _require()
    return torch.ops.torch_sinkhorn_attn.cpu_capabilities()


def set_capability(name: str) -> None:
    """Choose the instruction set for all following calls of this process.

    Raises:
        ValueError: this processor does not have it.
    """
    if name not in capabilities():
        raise ValueError(f"capability={name!r} is not usable on this processor; choose one of {capabilities()}.")
    torch.ops.torch_sinkhorn_attn.cpu_set_capability(name)


def workspace_budget() -> int:
    """Bytes of plan tiles that all calls of the process may keep at a time, whatever the number of threads, torch's or
    Python's; 64 MiB, which holds one head of 4096 tokens in float32, or a window of (128, 128) over 55,000. Beside them
    a call takes O(n) memory for each problem that it works on. Threads take whole problems while the tiles of these
    find room together, and help each other with the rest; a call that finds the room taken by others computes its tiles
    again in each pass, to the same bits.

    Up to so many bytes of workspace stay allocated from one call to the next. They hold nothing: to map fresh pages
    takes as long as the work of a narrow band. TORCH_SINKHORN_ATTN_CPU_WORKSPACE_MIB sets the budget at import."""
    return _budget


def set_workspace_budget(num_bytes: int) -> None:
    """Set `workspace_budget()`, and free the workspace kept if it is larger; 0 keeps nothing.

    Raises:
        ValueError: negative.
    """
    global _budget
    if num_bytes < 0:
        raise ValueError(f"num_bytes={num_bytes} must be 0 or more.")
    _budget = int(num_bytes)
    if _unavailable is None:
        torch.ops.torch_sinkhorn_attn.cpu_retain_workspace(_budget)


def unavailable() -> str | None:
    """Why there are no kernels, and how to get them; None where there are."""
    return _unavailable


def _require() -> None:
    if _unavailable is not None:
        raise RuntimeError(f"engine='cpu' is not available: {_unavailable}.")


class CpuEngine(Engine):
    """The engine of CPU tensors."""

    name = device = NAME

    def status(self) -> str:
        if _unavailable is not None:
            return f"missing: {_unavailable}"
        return f"C++ kernels for CPU tensors, {capability()} (of {', '.join(capabilities())})"

    def refusal(self, inputs: Inputs, problem: Problem) -> str | None:
        """There are no kernels, or the tensors are elsewhere."""
        if _unavailable is not None:
            return _unavailable
        device = inputs.query.device.type
        return None if device == self.device else f"it runs on CPU tensors, and query is on {device}"

    def solve(self, inputs: Inputs, problem: Problem) -> Potentials:
        return self.forward(inputs._replace(value=None), problem, residuals=False).potentials

    def forward(self, inputs: Inputs, problem: Problem, residuals: bool = True) -> Result:
        output, row, col, row_residual, col_residual, to_bin, from_bin = _run(
            torch.ops.torch_sinkhorn_attn.cpu_forward, *_arguments(inputs, problem), residuals
        )
        if not residuals:
            row_residual, col_residual = (row.new_full(row.shape[1:3], torch.nan) for _ in range(2))
        return Result(output, Potentials(row, col), row_residual, col_residual, to_bin, from_bin)

    def plan(self, inputs: Inputs, problem: Problem, log: bool = False) -> tuple[Tensor, Potentials]:
        if log:
            return super().plan(inputs, problem, log)
        arguments = _arguments(inputs._replace(value=None), problem)
        found, row, col = _run(torch.ops.torch_sinkhorn_attn.cpu_plan, *arguments)
        return found, Potentials(row, col)

    def matches(self, inputs: Inputs, problem: Problem, k: int) -> Partners:
        """Found while the plan is read for the last time; for more than a few partners, from tiles."""
        if k > MOST_PARTNERS:
            return super().matches(inputs, problem, k)
        arguments = _arguments(inputs._replace(value=None, dustbin_value=None), problem)
        return Partners(*_run(torch.ops.torch_sinkhorn_attn.cpu_matches, *arguments, k))

    def backward(
        self, inputs: Inputs, problem: Problem, output: Tensor, potentials: Potentials, grads: OutputGrads
    ) -> Gradients:
        """2R passes for the tail in R + 1 readings of the plan; conjugate gradients when it is implicit."""
        return _backward(inputs, problem, potentials, grads.output, grads.mask, (grads.to_bin, grads.from_bin, output))

    def plan_backward(
        self,
        inputs: Inputs,
        problem: Problem,
        potentials: Potentials,
        grad_plan: Tensor,
        mask_grad: bool,
        log: bool = False,
    ) -> Gradients:
        """Likewise; of the logarithm by the dense staircase."""
        if log:
            return super().plan_backward(inputs, problem, potentials, grad_plan, mask_grad, log)
        return _backward(inputs._replace(value=None), problem, potentials, grad_plan, mask_grad, (None, None, None))


ENGINE = CpuEngine()


def _backward(
    inputs: Inputs,
    problem: Problem,
    potentials: Potentials,
    grad: Tensor,
    mask_grad: bool,
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Gradients:
    dtype = compute_dtype(inputs.query.dtype)
    to_bin, from_bin, output = (_vector(x, dtype) for x in vectors)
    query, key, value, mask, row_score, col_score, corner, stored, dropped = _run(
        torch.ops.torch_sinkhorn_attn.cpu_backward,
        grad.to(dtype), to_bin, from_bin, output, *(x.contiguous() for x in potentials),
        *_arguments(inputs, problem), mask_grad,
    )  # fmt: skip
    key_heads = inputs.key.shape[1]
    found = Inputs(
        query,
        _by_key_head(key, key_heads),
        None if inputs.value is None else _by_key_head(value, key_heads),
        mask if mask_grad and inputs.mask is not None else None,
    )
    if problem.has_dustbin:
        found = found._replace(row_score=row_score, col_score=col_score, corner_score=corner.sum(-1))
    if inputs.dustbin_value is not None and output is not None:
        found = found._replace(dustbin_value=stored.sum(2))
    return Gradients(found, dropped)


def _run(op: Callable[..., Any], *arguments: Any) -> Any:
    """Call an op of the kernels. It ends early when a signal is pending; Python's handler then runs here, between two
    turns of the loop, and where it does not raise (KeyboardInterrupt, as a rule) the call is made again."""
    while True:
        try:
            return op(*arguments)
        except RuntimeError as error:
            if INTERRUPTED not in str(error):
                raise


def _by_key_head(grad: Tensor, key_heads: int) -> Tensor:
    """`[N, H, S, E]` summed over the query heads of each key head."""
    heads = grad.shape[1]
    return grad if heads == key_heads else grad.unflatten(1, (key_heads, heads // key_heads)).sum(2)


def _vector(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype).contiguous()


def _arguments(inputs: Inputs, problem: Problem) -> tuple[list[Tensor | None], list[float], list[int]]:
    """The lists of csrc/ops.cpp, whose places are named there."""
    dtype = compute_dtype(inputs.query.dtype)
    tensors: list[Tensor | None] = [*inputs[:4], *(_vector(x, dtype) for x in inputs[4:])]
    for name in _TENSORS:
        x = LEAF[name](problem)
        tensors.append(_vector(x, dtype) if x is not None and x.is_floating_point() else _integers(x))
    numbers = [LEAF[name](problem) for name in _NUMBERS]
    s, poisoned = problem.solver, releases.poisons_memory()
    accelerated = s.acceleration is not None
    counts = [s.stopped, s.kept, s.gradient == "implicit", problem.outline.banded, _budget, poisoned, accelerated]
    return tensors, numbers, [int(x) for x in counts]


def _integers(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _budget_of_environment() -> int:
    mebibytes = os.environ.get(_BUDGET_VARIABLE, "")
    if mebibytes and not mebibytes.isdecimal():
        raise ValueError(f"{_BUDGET_VARIABLE}={mebibytes!r} must be a whole number of MiB, 0 or more.")
    return int(mebibytes) << 20 if mebibytes else DEFAULT_BUDGET


set_workspace_budget(_budget_of_environment())
