"""The typed semantics every engine works on: tensors in one canonical layout, and one frozen description of the
problem: its support, its marginals and the numbers of its solver.

Shapes used throughout: N flattened batch, H query heads, Hk key/value heads (H a multiple of Hk), L queries, S keys,
E features, Ev value features, G dustbins per head (one per packed segment; 1 without segments).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn.options import Solver
from torch_sinkhorn_attn.problem.segments import with_dustbin


class Inputs(NamedTuple):
    """The tensors gradients flow to. Absent ones are None."""

    query: Tensor  # [N, H, L, E]
    key: Tensor  # [N, Hk, S, E]
    value: Tensor | None = None  # [N, Hk, S, Ev]; None when only the plan is wanted
    mask: Tensor | None = None  # bool (True = keep) or float, 4-D, broadcasts to [N, H, L, S]
    row_score: Tensor | None = None  # [N, H, L], "query i unmatched"
    col_score: Tensor | None = None  # [N, H, S], "key j unmatched"
    corner_score: Tensor | None = None  # [N, H]
    dustbin_value: Tensor | None = None  # [N, H, Ev], None = zero

    @property
    def has_dustbin(self) -> bool:
        return self.row_score is not None


class Potentials(NamedTuple):
    """The duals the tail's backward needs: u^0..u^R and v^0..v^R, stacked.

    `row` is `[R+1, N, H, L+G]`, `col` is `[R+1, N, H, S+G]` (no `+G` without a dustbin). For R = 0 they hold
    (u, v^0): the row half-step taken from the stopped v^0.
    """

    row: Tensor
    col: Tensor


class Result(NamedTuple):
    """What every engine's forward returns, in the compute dtype."""

    output: Tensor  # [N, H, L, Ev]
    potentials: Potentials
    row_residual: Tensor  # [N, H]
    col_residual: Tensor  # [N, H]
    row_dustbin: Tensor  # [N, H, L], empty without a dustbin
    col_dustbin: Tensor  # [N, H, S], empty without a dustbin


class OutputGrads(NamedTuple):
    """What an engine's backward is given: cotangents of the output and of the dustbin masses (None = zero)."""

    output: Tensor  # [N, H, L, Ev]
    to_bin: Tensor | None = None  # [N, H, L]
    from_bin: Tensor | None = None  # [N, H, S]
    mask: bool = False  # whether the cotangent of a float mask is wanted


class Partners(NamedTuple):
    """What every engine's `matches` returns: the k largest plan entries of each token, falling, ties to the lowest
    index, NaN first; -1 and 0 where fewer are left. Masses are in the compute dtype, indices int64."""

    row_index: Tensor  # [N, H, L, k]
    row_plan: Tensor
    col_index: Tensor  # [N, H, S, k]
    col_plan: Tensor
    row_dustbin: Tensor  # [N, H, L] mass sent to the token's own dustbin, empty without one
    col_dustbin: Tensor  # [N, H, S]


class Gradients(NamedTuple):
    """What an engine's backward returns, in the compute dtype."""

    inputs: Inputs  # cotangents field by field, None where absent or not wanted
    dropped: Tensor  # z^0 [N, H, L(+G)], what the surrogate drops; w^0 [N, H, S(+G)] for R = 0; zeros when implicit


@dataclass(frozen=True)
class Intervals:
    """The support before the mask: an interval of columns for each row, its transpose, and packed segments."""

    row_lo: Tensor  # [N, L] int64, row i may attend to columns [row_lo, row_hi); (0, 0) where it has none
    row_hi: Tensor
    col_lo: Tensor  # [N, S] int64, the transpose: rows outside [col_lo, col_hi) do not attend to column j
    col_hi: Tensor
    row_segment: Tensor | None  # [N, L], [N, S] int64 index of the token's problem; None for one problem each
    col_segment: Tensor | None


@dataclass(frozen=True)
class Marginals:
    """Log masses of the tokens and of the dustbins."""

    log_row_mass: Tensor  # [N, H, L], -inf marks an inactive token, the only place it is marked
    log_col_mass: Tensor  # [N, H, S]
    log_row_capacity: Tensor | None  # [N, H, G] of the dustbin row and column, -inf where unused; None without
    log_col_capacity: Tensor | None

    @property
    def augmented(self) -> tuple[Tensor, Tensor]:
        """log a `[N, H, L+G]` and log b `[N, H, S+G]` with the dustbins' masses last, where there are any."""
        rows = with_dustbin(self.log_row_mass, self.log_row_capacity)
        return rows, with_dustbin(self.log_col_mass, self.log_col_capacity)


@dataclass(frozen=True)
class Outline:
    """What is known of the support before its data, so that it can decide what is compiled and which tiles are read.

    banded: False if every pair of active tokens is in the support before the mask, so intervals need no test.
    window_left, window_right: the user's window, -1 for unlimited.
    uniform: every batch element has all L queries and S keys in one segment before the mask.
    paired: not uniform, but queries and keys have the same lengths and segments, L = S, and the window lies around the
        diagonal: query k is then beside key k.
    """

    banded: bool
    window_left: int
    window_right: int
    uniform: bool
    paired: bool = False


@dataclass(frozen=True)
class Problem:
    """One batch of entropic optimal-transport problems on a support, checked and complete; no user argument is left.
    Its tensors are constants of the differentiation."""

    support: Intervals
    marginals: Marginals
    initial_row: Tensor | None  # warm start [N, H, L+G], [N, H, S+G]; None for zeros
    initial_col: Tensor | None
    dropout_seed: Tensor | None  # [2] int64; None without dropout
    solver: Solver
    outline: Outline

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """N, H, L and S."""
        num, heads, length = self.marginals.log_row_mass.shape
        return num, heads, length, self.marginals.log_col_mass.shape[-1]

    @property
    def has_dustbin(self) -> bool:
        return self.marginals.log_row_capacity is not None

    @property
    def num_dustbins(self) -> int:
        """G, or 0 without a dustbin."""
        capacity = self.marginals.log_row_capacity
        return 0 if capacity is None else capacity.shape[-1]


# The leaves of a problem, depth first, as (part, leaf, type); "" is the problem itself.
_PARTS: dict[str, type[Any]] = {"support": Intervals, "marginals": Marginals, "solver": Solver, "outline": Outline}
LEAVES = tuple(
    (part.name if part.name in _PARTS else "", leaf.name, str(leaf.type))
    for part in fields(Problem)
    for leaf in (fields(_PARTS[part.name]) if part.name in _PARTS else (part,))
)
LEAF = {name: attrgetter(f"{part}.{name}" if part else name) for part, name, _ in LEAVES}  # each leaf of a problem


def leaves(problem: Problem) -> list[Any]:
    """All leaves, in the order of `LEAVES`."""
    return [getattr(getattr(problem, part) if part else problem, name) for part, name, _ in LEAVES]


def from_leaves(flat: Sequence[Any]) -> Problem:
    """The inverse of `leaves`."""
    return Problem(*(flat[at] if part is None else part(*flat[at:end]) for part, at, end in _SPANS))


def _spans() -> Iterator[tuple[type[Any] | None, int, int]]:
    at = 0
    for field in fields(Problem):
        part = _PARTS.get(field.name)
        end = at + (1 if part is None else len(fields(part)))
        yield part, at, end
        at = end


_SPANS = tuple(_spans())


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype potentials and accumulations live in: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(x: Any) -> AbstractContextManager[object]:
    """`full_precision` on the device of what may be a tensor."""
    return full_precision(x.device) if isinstance(x, Tensor) else nullcontext()


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Keeps the caller's autocast out: dtypes are chosen by the inputs alone."""
    if device.type == "meta":  # autocast does not know it
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
