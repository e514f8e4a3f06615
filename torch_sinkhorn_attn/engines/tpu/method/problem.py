"""What the kernels work on: the arrays and the scalars of `torch_sinkhorn_attn.problem.problem`, under the same names,
in JAX.

Shapes: N flattened batch, H query heads, Hk key heads (H a multiple of Hk), L queries, S keys, E features, Ev value
features, G dustbins per head (one per packed segment; 1 without segments). Index arrays are int32: a TPU has no int64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from torch_sinkhorn_attn.engines.tpu.method.sequence import Sequence
from torch_sinkhorn_attn.options import Solver


class Inputs(NamedTuple):
    """The arrays gradients flow to. Absent ones are None."""

    query: Array  # [N, H, L, E]
    key: Array  # [N, Hk, S, E]
    value: Array | None = None  # [N, Hk, S, Ev]; None when only the duals are wanted
    mask: Array | None = None  # bool (True = keep) or float, 4-D, broadcasts to [N, H, L, S]
    row_score: Array | None = None  # [N, H, L], "query i unmatched"
    col_score: Array | None = None  # [N, H, S], "key j unmatched"
    corner_score: Array | None = None  # [N, H]
    dustbin_value: Array | None = None  # [N, H, Ev], None = zero


class Constants(NamedTuple):
    """The arrays of a problem that are not differentiated: intervals, segments and masses are data, never shapes."""

    row_lo: Array  # [N, L]; row i may attend to columns [row_lo, row_hi); (0, 0) where it has none
    row_hi: Array
    col_lo: Array  # [N, S], the transpose
    col_hi: Array
    log_row_mass: Array  # [N, H, L]; -inf marks an inactive token, the only place it is marked
    log_col_mass: Array  # [N, H, S]
    row_segment: Array | None = None  # [N, L], [N, S]: index of the token's problem; None for one problem each
    col_segment: Array | None = None
    log_row_capacity: Array | None = None  # [N, H, G] log mass of the dustbin row and column; -inf where unused
    log_col_capacity: Array | None = None
    initial_row: Array | None = None  # warm start [N, H, L+G], [N, H, S+G], None for zeros
    initial_col: Array | None = None
    dropout_seed: Array | None = None  # [2] uint32, or None without dropout
    head_index: Array | None = None  # [N, H] number of each head in the batch this is a shard of; None: it is the whole

    @property
    def num_dustbins(self) -> int:
        """G, or 0 without a dustbin."""
        return 0 if self.log_row_capacity is None else self.log_row_capacity.shape[-1]


@dataclass(frozen=True)
class Statics:
    """The scalars of a problem, documented in `torch_sinkhorn_attn.problem.problem.Problem`; part of the compiled
    program.

    `stopped`, `kept`: iterations that are not, and that are, differentiated: (T, R), or (0, T + R) when unrolled.
    `sequence`: how the tokens lie on several devices; None: all are here.
    """

    scale: float
    epsilon: float = 1.0
    rho_row: float = 1.0
    rho_col: float = 1.0
    stopped: int = 20
    kept: int = 2
    tolerance: float = 0.0
    over_relaxation: float = 1.0
    acceleration: str | None = None
    contraction: float = 0.0
    implicit: bool = False
    dropout_p: float = 0.0
    banded: bool = False
    window_left: int = -1
    window_right: int = -1
    uniform: bool = True
    paired: bool = False
    sequence: Sequence | None = None

    @classmethod
    def of(cls, solver: Solver, **outline: Any) -> Statics:
        """From the checked options, and what is known of the support before its data."""
        taken = {name: x for name, x in vars(solver).items() if name in cls.__dataclass_fields__}
        implicit = solver.gradient == "implicit"
        return cls(**taken, stopped=solver.stopped, kept=solver.kept, implicit=implicit, **outline)

    @property
    def balanced(self) -> bool:
        return self.rho_row == 1.0 and self.rho_col == 1.0


class Result(NamedTuple):
    """What `forward` returns, in the compute dtype (float32; float64 for float64)."""

    output: Array | None  # [N, H, L, Ev], None without a value
    row_potentials: Array  # [kept+1, N, H, L+G]: u^0..u^R; for R = 0 the row half-step taken from the stopped v^0
    col_potentials: Array  # [kept+1, N, H, S+G]
    row_residual: Array  # [N, H], NaN where not asked for
    col_residual: Array
    row_dustbin: Array | None  # [N, H, L] mass sent to the dustbin, None without one
    col_dustbin: Array | None  # [N, H, S]


class Field(NamedTuple):
    """The modifier field of the score cotangent, as factors at other potentials:

    dS_ij = P_ij D_ij - sum_k x_ki y_kj exp(S_ij + p_ki + q_kj)
    """

    p: Array  # [K, N, H, L]
    q: Array  # [K, N, H, S]
    x: Array  # [K, N, H, L]
    y: Array  # [K, N, H, S]


class Passes(Protocol):
    """Readings of the real scores S (mask and support inside, the dustbin not): what a blockwise, or a streaming, path
    must offer. M(p, q)_ij = exp(S_ij + p_i + q_j) on the support, 0 off it. All vectors are `[N, H, L]` rows and
    `[N, H, S]` columns; p and q are finite, what inactive tokens hold is not read."""

    def row_lse(self, v: Array) -> Array:
        """LSE_j(S_ij + v_j), -inf on a row without support."""

    def column_lse(self, u: Array) -> Array:
        """LSE_i(S_ij + u_i), -inf on a column without support."""

    def rows(self, p: Array, q: Array, y: Array) -> Array:
        """M(p, q) y."""

    def columns(self, p: Array, q: Array, x: Array) -> Array:
        """M(p, q)^T x."""

    def both(self, p: Array, q: Array, y: Array, weight: Array, more: Array) -> tuple[Array, Array]:
        """M(p, q) y, and M(p, q)^T x for x = weight * (M(p, q) y + more)."""
        rows = self.rows(p, q, y)
        return rows, self.columns(p, q, weight * (rows + more))

    def values(self, u: Array, v: Array) -> tuple[Array, Array]:
        """M(u, v) V with dropout `[N, H, L, Ev]`, and the row sums of M(u, v) without it `[N, H, L]`."""

    def value_cotangent(self, u: Array, v: Array, grad: Array) -> Array:
        """M(u, v)^T grad with dropout, per query head: `[N, H, L, Ev]` to `[N, H, S, Ev]`."""

    def query_cotangent(
        self, u: Array, v: Array, grad: Array, field: Field, mask_grad: bool
    ) -> tuple[Array, Array | None]:
        """dS K `[N, H, L, E]`, and the cotangent of a float mask in the mask's shape; D_ij = <grad_i, V_j>, dropout
        applied, P = M(u, v)."""

    def key_cotangent(self, u: Array, v: Array, grad: Array, field: Field) -> Array:
        """dS^T Q, per query head: `[N, H, S, E]`."""


def compute_dtype(x: Array | jax.ShapeDtypeStruct) -> jnp.dtype:
    """float64 for float64 (XLA:CPU only), float32 for everything else."""
    return jnp.dtype("float64" if x.dtype == jnp.float64 else "float32")
