"""What the adjoint over tiles needs of the dustbin."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_sinkhorn_attn.method.dustbin_vectors import DustbinVectors, Vectors
from torch_sinkhorn_attn.method.staircase import Factor, Field


class DustbinPlan(DustbinVectors):
    """The dustbin of a plan whose factors and cotangents are told beside log P."""

    def times_exp(self, log_plan: Vectors, factor: Factor) -> Vectors:
        """The factor P * exp(row_i + col_j) on column, row and corner."""
        row, row_bin = factor.row[..., : self.length], factor.row[..., self.length :]
        col, col_bin = factor.col[..., : self.size], factor.col[..., self.size :]
        column, line, corner = log_plan
        exponents = row + self.at_rows(col_bin), col + self.at_cols(row_bin), row_bin + col_bin
        return Vectors((column + exponents[0]).exp(), (line + exponents[1]).exp(), (corner + exponents[2]).exp())

    def score_cotangent(self, log_plan: Vectors, to_bin: Tensor, from_bin: Tensor, field: Field) -> Vectors:
        """dS on column, row and corner, for D = `to_bin`, `from_bin` and 0 there."""
        column, row, corner = (x.exp() for x in log_plan)
        return self.less_field(log_plan, Vectors(column * to_bin, row * from_bin, torch.zeros_like(corner)), field)

    def less_field(self, log_plan: Vectors, weighted: Vectors, field: Field) -> Vectors:
        """dS there from `weighted` = P * D."""
        total = list(weighted)
        for k in range(field.row_terms.shape[-1]):
            zeros = torch.zeros_like(field.row_terms[..., k]), torch.zeros_like(field.col_terms[..., k])
            exponents = zeros if field.row_exponents is None else (field.row_exponents[..., k], zeros[1])
            if field.col_exponents is not None:
                exponents = exponents[0], field.col_exponents[..., k]
            factor = self.times_exp(log_plan, Factor(*exponents, False))
            x, x_bin = field.row_terms[..., : self.length, k], field.row_terms[..., self.length :, k]
            y, y_bin = field.col_terms[..., : self.size, k], field.col_terms[..., self.size :, k]
            weights = x * self.at_rows(y_bin), y * self.at_cols(x_bin), x_bin * y_bin
            total = [t - f * w for t, f, w in zip(total, factor, weights, strict=True)]
        return Vectors(*total)
