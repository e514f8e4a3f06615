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
from typing import TYPE_CHECKING, Any, NamedTuple

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

if TYPE_CHECKING:
    from torch_sinkhorn_attn.distributed.share import Share
    from torch_sinkhorn_attn.distributed.tiles import OfRank

NAME = "cpu"
DEFAULT_BUDGET = 64 << 20
INTERFACE = 6  # as kInterface in csrc/ops.cpp; raised whenever the arguments change
MOST_PARTNERS = 16  # as kMostPartners in csrc/problem.h
INTERRUPTED = "interrupted by a signal"  # as in csrc/schedule.cpp
_FOLDER = Path(__file__).parent
_BUDGET_VARIABLE = "TORCH_SINKHORN_ATTN_CPU_WORKSPACE_MIB"
_LIBRARY = _FOLDER / "_cpu.so"
_RELEASES = _FOLDER / "_cpu_torch.txt"  # "2.9", or "2.10+": the releases of torch it is for; written by setup.py
_REASON = _FOLDER / "_cpu_missing.txt"  # written by setup.py where it could not build the kernels
# The lists of its ops, whose places csrc/checks.h names: the leaves of a problem, by type, but for the transposed
# intervals, which the kernels do without; and counts.
TENSORS = tuple(x for _, x, kind in LEAVES if kind.startswith("Tensor") and x not in ("col_lo", "col_hi"))
_NUMBERS = tuple(x for part, x, kind in LEAVES if kind == "float")
_SEED = TENSORS.index("dropout_seed")
COUNTS = ("stopped", "kept", "implicit", "banded", "budget", "poisoned", "accelerated")


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
    again in each pass, to the same bits. A rank of a sharded sequence keeps as many, of all its heads together, from
    one half-step of a call to the next.

    Up to so many bytes of workspace stay allocated from one call to the next. They hold nothing: to map fresh pages
    takes as long as the work of a narrow band. TORCH_SINKHORN_ATTN_CPU_WORKSPACE_MIB sets the budget at import."""
    return _budget


def set_workspace_budget(num_bytes: int) -> None:
    """Set `workspace_budget()`, and free the workspace kept if it is larger; 0 keeps nothing.

    Raises:
        ValueError: negative, or 2**62 and more.
    """
    global _budget
    if num_bytes < 0:
        raise ValueError(f"num_bytes={num_bytes} must be 0 or more.")
    if num_bytes >= 1 << 62:
        raise ValueError(f"num_bytes={num_bytes} must be less than 2**62, which is no limit.")
    _budget = int(num_bytes)
    if _unavailable is None:
        torch.ops.torch_sinkhorn_attn.cpu_retain_workspace(_budget)


def unavailable() -> str | None:
    """Why there are no kernels, and how to get them; None where there are."""
    return _unavailable


def _require() -> None:
    if _unavailable is not None:
        raise RuntimeError(f"engine='cpu' is not available: {_unavailable}.")


class Constants(NamedTuple):
    """What the arguments of the kernels hold of a problem beside its inputs and what may change between two calls; made
    once for all calls that share the problem."""

    tensors: list[Tensor | None]
    numbers: list[float]
    counts: list[int]


def constants(problem: Problem, dtype: torch.dtype) -> Constants:
    """Those of a problem whose inputs are of `dtype`."""
    dtype = compute_dtype(dtype)
    tensors = [LEAF[name](problem) for name in TENSORS]
    s = problem.solver
    counts = [s.stopped, s.kept, s.gradient == "implicit", problem.outline.banded, 0, 0, s.acceleration is not None]
    return Constants(
        [_vector(x, dtype) if x is not None and x.is_floating_point() else _integers(x) for x in tensors],
        [LEAF[name](problem) for name in _NUMBERS],
        [int(x) for x in counts],
    )


class CpuEngine(Engine):
    """The engine of CPU tensors."""

    name = device = NAME
    of_ranks = True

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
        result = forward(inputs, problem, residuals)
        if residuals:
            return result
        nan = result.potentials.row.new_full(result.potentials.row.shape[1:3], torch.nan)
        return result._replace(row_residual=nan, col_residual=nan.clone())

    def plan(self, inputs: Inputs, problem: Problem, log: bool = False) -> tuple[Tensor, Potentials]:
        return super().plan(inputs, problem, log) if log else plan(inputs, problem)

    def matches(self, inputs: Inputs, problem: Problem, k: int) -> Partners:
        """Found while the plan is read for the last time; for more than a few partners, from tiles."""
        if k > MOST_PARTNERS:
            return super().matches(inputs, problem, k)
        given = arguments(inputs._replace(value=None, dustbin_value=None), problem)
        return Partners(*run(torch.ops.torch_sinkhorn_attn.cpu_matches, *given, k))

    def backward(
        self, inputs: Inputs, problem: Problem, output: Tensor, potentials: Potentials, grads: OutputGrads
    ) -> Gradients:
        """2R passes for the tail in R + 1 readings of the plan; conjugate gradients when it is implicit."""
        return backward(inputs, problem, output, potentials, grads)

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
        return plan_backward(inputs, problem, potentials, grad_plan, mask_grad)

    def rank_missing(self) -> str | None:
        return _unavailable

    def rank_plan(self, inputs: Inputs, share: Share) -> OfRank:
        from torch_sinkhorn_attn.engines import cpu_ranks

        return cpu_ranks.SharedKernels(inputs, share)

    def rank_gradients(self, plan: OfRank, output: Tensor, potentials: Potentials, grads: OutputGrads) -> Inputs:
        from torch_sinkhorn_attn.engines import cpu_ranks

        assert isinstance(plan, cpu_ranks.SharedKernels)
        return cpu_ranks.gradients(plan, output, potentials, grads)


ENGINE = CpuEngine()


# The verbs, with what was made of a problem before, where it was


def forward(inputs: Inputs, problem: Problem, residuals: bool, shared: Constants | None = None) -> Result:
    """As the engine's, but residuals that are not asked for are empty."""
    output, row, col, *rest = run(
        torch.ops.torch_sinkhorn_attn.cpu_forward, *arguments(inputs, problem, shared), residuals
    )
    return Result(output, Potentials(row, col), *rest)


def plan(inputs: Inputs, problem: Problem, shared: Constants | None = None) -> tuple[Tensor, Potentials]:
    given = arguments(inputs._replace(value=None), problem, shared)
    found, row, col = run(torch.ops.torch_sinkhorn_attn.cpu_plan, *given)
    return found, Potentials(row, col)


def backward(
    inputs: Inputs,
    problem: Problem,
    output: Tensor,
    potentials: Potentials,
    grads: OutputGrads,
    shared: Constants | None = None,
) -> Gradients:
    vectors = grads.to_bin, grads.from_bin, output
    return _backward(inputs, problem, potentials, grads.output, grads.mask, vectors, shared)


def plan_backward(
    inputs: Inputs,
    problem: Problem,
    potentials: Potentials,
    grad_plan: Tensor,
    mask_grad: bool,
    shared: Constants | None = None,
) -> Gradients:
    inputs = inputs._replace(value=None)
    return _backward(inputs, problem, potentials, grad_plan, mask_grad, (None, None, None), shared)


def _backward(
    inputs: Inputs,
    problem: Problem,
    potentials: Potentials,
    grad: Tensor,
    mask_grad: bool,
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None],
    shared: Constants | None,
) -> Gradients:
    dtype = compute_dtype(inputs.query.dtype)
    to_bin, from_bin, output = (_vector(x, dtype) for x in vectors)
    query, key, value, mask, row_score, col_score, corner, stored, dropped = run(
        torch.ops.torch_sinkhorn_attn.cpu_backward,
        grad.to(dtype), to_bin, from_bin, output, *(x.contiguous() for x in potentials),
        *arguments(inputs, problem, shared), mask_grad,
    )  # fmt: skip
    key_heads = inputs.key.shape[1]
    found = Inputs(
        query,
        by_key_head(key, key_heads),
        None if inputs.value is None else by_key_head(value, key_heads),
        mask if mask_grad and inputs.mask is not None else None,
    )
    if problem.has_dustbin:
        found = found._replace(row_score=row_score, col_score=col_score, corner_score=corner.sum(-1))
    if inputs.dustbin_value is not None and output is not None:
        found = found._replace(dustbin_value=stored.sum(2))
    return Gradients(found, dropped)


def run(op: Callable[..., Any], *arguments: Any) -> Any:
    """Call an op of the kernels. It ends early when a signal is pending; Python's handler then runs here, between two
    turns of the loop, and where it does not raise (KeyboardInterrupt, as a rule) the call is made again."""
    while True:
        try:
            return op(*arguments)
        except RuntimeError as error:
            if INTERRUPTED not in str(error):
                raise


def by_key_head(grad: Tensor, key_heads: int) -> Tensor:
    """`[N, H, S, E]` summed over the query heads of each key head."""
    heads = grad.shape[1]
    return grad if heads == key_heads else grad.unflatten(1, (key_heads, heads // key_heads)).sum(2)


def _vector(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype).contiguous()


def arguments(
    inputs: Inputs, problem: Problem, shared: Constants | None = None
) -> tuple[list[Tensor | None], list[float], list[int]]:
    """The lists of csrc/ops.cpp, whose places are named there. `shared`: of a problem that differs from this one in
    nothing but the dropout seed."""
    dtype = inputs.query.dtype
    tensors, numbers, counts = constants(problem, dtype) if shared is None else shared
    bins = [_vector(x, compute_dtype(dtype)) for x in inputs[4:]]
    seed = _integers(problem.dropout_seed)
    given = [*inputs[:4], *bins, *tensors[:_SEED], seed, *tensors[_SEED + 1 :]]
    return given, numbers, [*counts[:4], _budget, int(releases.poisons_memory()), counts[6]]


def _integers(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _budget_of_environment() -> int:
    mebibytes = os.environ.get(_BUDGET_VARIABLE, "")
    if mebibytes and not mebibytes.isdecimal():
        raise ValueError(f"{_BUDGET_VARIABLE}={mebibytes!r} must be a whole number of MiB, 0 or more.")
    return int(mebibytes) << 20 if mebibytes else DEFAULT_BUDGET


set_workspace_budget(_budget_of_environment())
