"""What the adjoint over `Passes` needs of the dustbin."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from torch_sinkhorn_attn.engines.tpu.method.problem import Field
from torch_sinkhorn_attn.method.dustbin_vectors import DustbinVectors, Vectors


class DustbinMatrix(DustbinVectors):
    """The dustbin's part of matrices M(p, q), for p and q that are -inf on inactive lines."""

    def matrix(self, p: Array, q: Array) -> Vectors:
        """The entries of M(p, q) there."""
        return Vectors(*map(jnp.exp, self.log_plan(p, q)))

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
