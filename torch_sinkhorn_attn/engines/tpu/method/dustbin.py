"""The dustbin beside the tiles: its column, row and corner as vectors, so that it never costs a tile."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from torch_sinkhorn_attn.engines.tpu.method.problem import Constants, Field, Inputs
from torch_sinkhorn_attn.problem.segments import by_segment, segment_logsumexp, segment_sum


class Vectors(NamedTuple):
    """Of each entry of the dustbin's column `[..., N, H, L]`, row `[..., N, H, S]` and corner `[..., N, H, G]`."""

    column: Array
    row: Array
    corner: Array


class Dustbin:
    """Scores of the dustbin, divided by epsilon, and what passes over the plan need of it.

    Vectors p, q, x, y are augmented, `[..., N, H, L+G]` and `[..., N, H, S+G]`; p and q are -inf on inactive lines.
    """

    def __init__(self, inputs: Inputs, constants: Constants, epsilon: float, dtype: jnp.dtype):
        assert inputs.row_score is not None and inputs.col_score is not None and inputs.corner_score is not None
        self.row, self.col = (x.astype(dtype) / epsilon for x in (inputs.row_score, inputs.col_score))
        self.corner = inputs.corner_score.astype(dtype)[..., None] / epsilon
        self.length, self.size, self.count = self.row.shape[-1], self.col.shape[-1], constants.num_dustbins
        self.row_index, self.col_index = (
            None if s is None else s[:, None] for s in (constants.row_segment, constants.col_segment)
        )

    def column_lse(self, real: Array, u: Array) -> Array:
        """LSE over rows `[N, H, S+G]` of the augmented scores + u, from its real part `[N, H, S]`."""
        u_bin = u[..., self.length :]
        real = jnp.logaddexp(real, self.col + self.at_cols(u_bin))
        own = segment_logsumexp(self.row + u[..., : self.length], self.row_index, self.count)
        return jnp.concatenate([real, jnp.logaddexp(own, self.corner + u_bin)], -1)

    def row_lse(self, real: Array, v: Array) -> Array:
        """LSE over columns `[N, H, L+G]` of the augmented scores + v."""
        v_bin = v[..., self.size :]
        real = jnp.logaddexp(real, self.row + self.at_rows(v_bin))
        own = segment_logsumexp(self.col + v[..., : self.size], self.col_index, self.count)
        return jnp.concatenate([real, jnp.logaddexp(own, self.corner + v_bin)], -1)

    def matrix(self, p: Array, q: Array) -> Vectors:
        """The entries of M(p, q) there."""
        p_bin, q_bin = p[..., self.length :], q[..., self.size :]
        return Vectors(
            jnp.exp(self.row + p[..., : self.length] + self.at_rows(q_bin)),
            jnp.exp(self.col + q[..., : self.size] + self.at_cols(p_bin)),
            jnp.exp(self.corner + p_bin + q_bin),
        )

    def complete_rows(self, real: Array, matrix: Vectors, y: Array) -> Array:
        """M y `[N, H, L+G]` from its real part."""
        y_bin = y[..., self.size :]
        own = self.sum_cols(matrix.row * y[..., : self.size]) + matrix.corner * y_bin
        return jnp.concatenate([real + matrix.column * self.at_rows(y_bin), own], -1)

    def complete_cols(self, real: Array, matrix: Vectors, x: Array) -> Array:
        """M^T x `[N, H, S+G]` from its real part."""
        x_bin = x[..., self.length :]
        own = self.sum_rows(matrix.column * x[..., : self.length]) + matrix.corner * x_bin
        return jnp.concatenate([real + matrix.row * self.at_cols(x_bin), own], -1)

    def score_cotangent(self, plan: Vectors, to_bin: Array, from_bin: Array, field: Field) -> Vectors:
        """dS there, for D = `to_bin`, `from_bin` and 0, and an augmented field."""
        factors = self.matrix(field.p, field.q)
        x, x_bin = field.x[..., : self.length], field.x[..., self.length :]
        y, y_bin = field.y[..., : self.size], field.y[..., self.size :]
        return Vectors(
            plan.column * to_bin - (factors.column * x * self.at_rows(y_bin)).sum(0),
            plan.row * from_bin - (factors.row * y * self.at_cols(x_bin)).sum(0),
            -(factors.corner * x_bin * y_bin).sum(0),
        )

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
