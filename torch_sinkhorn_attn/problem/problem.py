"""The typed semantics every engine works on: tensors in one canonical layout, and one frozen description of the
problem.

Shapes used throughout: N flattened batch, H query heads, Hk key/value heads (H a multiple of Hk), L queries, S keys,
E features, Ev value features, G dustbins per head (one per packed segment; 1 without segments).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


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


class Gradients(NamedTuple):
    """What an engine's backward returns, in the compute dtype."""

    inputs: Inputs  # cotangents field by field, None where absent or not wanted
    dropped: Tensor  # z^0 [N, H, L(+G)], what the surrogate drops; w^0 [N, H, S(+G)] for R = 0; zeros when implicit


@dataclass(frozen=True)
class Problem:
    """One batch of entropic optimal-transport problems on a support, checked and complete; no user argument is left.

    Tensors (constants of the differentiation):
        row_lo, row_hi: `[N, L]` int64, row i may attend to columns `[row_lo, row_hi)`; (0, 0) where it has none.
        col_lo, col_hi: `[N, S]` int64, the transpose: rows outside `[col_lo, col_hi)` do not attend to column j.
        row_segment, col_segment: `[N, L]`, `[N, S]` int64 index of the token's problem, or None for one problem each.
        log_row_mass, log_col_mass: `[N, H, L]`, `[N, H, S]`; -inf marks an inactive token, the only place it is marked.
        log_row_capacity, log_col_capacity: `[N, H, G]` log mass of the dustbin row and column; -inf where unused.
        initial_row, initial_col: warm start, `[N, H, L+G]`, `[N, H, S+G]`, or None for zeros.
        dropout_seed: `[2]` int64, or None without dropout.

    Scalars:
        scale, epsilon: scores are `scale * q.k / epsilon + mask`.
        rho_row, rho_col: damping of the half-steps, `tau / (tau + epsilon)`; 1 is balanced.
        base_iters, tail_iters: T and R.
        tolerance: a problem's base ends early once the next plain column half-step would move no v_j by more; 0: never.
        over_relaxation: omega; a half-step of the base gives (1 - omega) * old + omega * plain.
        gradient: "tail", "implicit" or "unrolled".
        dropout_p: probability of dropping a real entry of P/a.
        banded: False if every pair of active tokens is in the support before the mask, so intervals need no test.
        window: the `(left, right)` of the user, for static tile bounds, or None.
        uniform: every batch element has all L queries and S keys in one segment before the mask.
    """

    row_lo: Tensor
    row_hi: Tensor
    col_lo: Tensor
    col_hi: Tensor
    row_segment: Tensor | None
    col_segment: Tensor | None
    log_row_mass: Tensor
    log_col_mass: Tensor
    log_row_capacity: Tensor | None
    log_col_capacity: Tensor | None
    initial_row: Tensor | None
    initial_col: Tensor | None
    dropout_seed: Tensor | None
    scale: float
    epsilon: float
    rho_row: float
    rho_col: float
    base_iters: int
    tail_iters: int
    tolerance: float
    over_relaxation: float
    gradient: str
    dropout_p: float
    banded: bool
    window_left: int
    window_right: int
    uniform: bool

    @property
    def has_dustbin(self) -> bool:
        return self.log_row_capacity is not None

    @property
    def num_dustbins(self) -> int:
        """G, or 0 without a dustbin."""
        return 0 if self.log_row_capacity is None else self.log_row_capacity.shape[-1]

    @property
    def balanced(self) -> bool:
        return self.rho_row == 1.0 and self.rho_col == 1.0

    @property
    def schedule(self) -> tuple[int, int]:
        """(stopped, differentiated) iterations: (T, R), or all of them differentiated when unrolled."""
        if self.gradient == "unrolled":
            return 0, self.base_iters + self.tail_iters
        return self.base_iters, self.tail_iters


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype potentials and accumulations live in: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Keeps the caller's autocast out: dtypes are chosen by the inputs alone."""
    if device.type == "meta":  # autocast does not know it
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
