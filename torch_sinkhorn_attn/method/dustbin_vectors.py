"""The dustbin beside the tiles: its column, row and corner as vectors, so that it never costs a tile. For torch and for
JAX."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch_sinkhorn_attn.arrays import Array, namespace
from torch_sinkhorn_attn.problem.segments import by_segment, segment_logsumexp, segment_sum


class Vectors(NamedTuple):
    """One number for each entry of the dustbin's column, row and corner."""

    column: Array  # [..., N, H, L]
    row: Array  # [..., N, H, S]
    corner: Array  # [..., N, H, G]


class DustbinVectors:
    """Scores of the dustbin, divided by epsilon, and what passes over the plan need of it.

    Vectors u, v, x, y are augmented, `[..., N, H, L+G]` and `[..., N, H, S+G]`.
    """

    def __init__(self, inputs: Any, problem: Any, epsilon: float, dtype: Any):
        xp = namespace(inputs.row_score)
        self.row, self.col = (xp.astype(x, dtype) / epsilon for x in (inputs.row_score, inputs.col_score))
        self.corner = xp.astype(inputs.corner_score, dtype)[..., None] / epsilon
        self.length, self.size, self.count = self.row.shape[-1], self.col.shape[-1], problem.num_dustbins
        support = getattr(problem, "support", problem)  # JAX's arrays stand in one
        self.row_index, self.col_index = (
            None if s is None else s[:, None] for s in (support.row_segment, support.col_segment)
        )

    # Half-steps: complete the LSE of the real part

    def column_lse(self, real: Array, u: Array) -> Array:
        """LSE over rows `[N, H, S+G]` of the augmented scores + u, from its real part `[N, H, S]`."""
        xp, u_bin = namespace(u), u[..., self.length :]
        real = xp.logaddexp(real, self.col + self.at_cols(u_bin))
        own = self.lse_rows(self.row + u[..., : self.length])
        return xp.concat([real, xp.logaddexp(own, self.corner + u_bin)], -1)

    def row_lse(self, real: Array, v: Array) -> Array:
        """LSE over columns `[N, H, L+G]` of the augmented scores + v."""
        xp, v_bin = namespace(v), v[..., self.size :]
        real = xp.logaddexp(real, self.row + self.at_rows(v_bin))
        own = self.lse_cols(self.col + v[..., : self.size])
        return xp.concat([real, xp.logaddexp(own, self.corner + v_bin)], -1)

    # The plan, or another matrix exp(S + u + v)

    def log_plan(self, u: Array, v: Array) -> Vectors:
        """Its logarithm on the dustbin's column, row and corner."""
        u_bin, v_bin = u[..., self.length :], v[..., self.size :]
        return Vectors(
            self.row + u[..., : self.length] + self.at_rows(v_bin),
            self.col + v[..., : self.size] + self.at_cols(u_bin),
            self.corner + u_bin + v_bin,
        )

    def complete_rows(self, real: Array, plan: Vectors, y: Array) -> Array:
        """P y `[N, H, L+G]` from its real part."""
        y_bin = y[..., self.size :]
        own = self.sum_cols(plan.row * y[..., : self.size]) + plan.corner * y_bin
        return namespace(y).concat([real + plan.column * self.at_rows(y_bin), own], -1)

    def complete_cols(self, real: Array, plan: Vectors, x: Array) -> Array:
        """P^T x `[N, H, S+G]` from its real part."""
        x_bin = x[..., self.length :]
        own = self.sum_rows(plan.column * x[..., : self.length]) + plan.corner * x_bin
        return namespace(x).concat([real + plan.row * self.at_cols(x_bin), own], -1)

    # Between tokens and the dustbin of their problem

    def at_rows(self, x: Array) -> Array:
        """`[..., N, H, G]` read at the dustbin of each row, `[..., N, H, L]`."""
        return by_segment(x, self.row_index, self.length)

    def at_cols(self, x: Array) -> Array:
        return by_segment(x, self.col_index, self.size)

    def sum_rows(self, x: Array) -> Array:
        """`[..., N, H, L]` summed over each problem, `[..., N, H, G]`."""
        return segment_sum(x, self.row_index, self.count)

    def sum_cols(self, x: Array) -> Array:
        return segment_sum(x, self.col_index, self.count)

    def lse_rows(self, x: Array) -> Array:
        """log sum exp likewise."""
        return segment_logsumexp(x, self.row_index, self.count)

    def lse_cols(self, x: Array) -> Array:
        return segment_logsumexp(x, self.col_index, self.count)
