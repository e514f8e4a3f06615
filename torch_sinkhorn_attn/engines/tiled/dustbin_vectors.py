"""The dustbin beside the tiles: its column, row and corner as vectors, so that it never costs a tile."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_sinkhorn_attn.method.staircase import Factor, Field
from torch_sinkhorn_attn.problem.problem import Inputs, Problem
from torch_sinkhorn_attn.problem.segments import by_segment, segment_sum

Vectors = tuple[Tensor, Tensor, Tensor]  # column [N, H, L], row [N, H, S], corner [N, H, G]


class DustbinVectors:
    """Scores of the dustbin, divided by epsilon, and what passes over the plan need of it. `u`, `v` are augmented."""

    def __init__(self, inputs: Inputs, problem: Problem, dtype: torch.dtype):
        row, col, corner = inputs.row_score, inputs.col_score, inputs.corner_score
        assert row is not None and col is not None and corner is not None
        self.row, self.col = (x.to(dtype) / problem.solver.epsilon for x in (row, col))
        self.corner = corner.to(dtype)[..., None] / problem.solver.epsilon
        self.length, self.size, self.count = row.shape[-1], col.shape[-1], problem.num_dustbins
        self.row_index, self.col_index = (
            None if s is None else s[:, None] for s in (problem.support.row_segment, problem.support.col_segment)
        )

    # Half-steps: complete the LSE of the real part

    def column_lse(self, real: Tensor, u: Tensor) -> Tensor:
        """LSE over rows `[N, H, S+G]` of the augmented scores + u, from its real part `[N, H, S]`."""
        u_bin = u[..., self.length :]
        real = torch.logaddexp(real, self.col + self.at_cols(u_bin))
        own = segment_logsumexp(self.row + u[..., : self.length], self.row_index, self.count)
        return torch.cat([real, torch.logaddexp(own, self.corner + u_bin)], -1)

    def row_lse(self, real: Tensor, v: Tensor) -> Tensor:
        v_bin = v[..., self.size :]
        real = torch.logaddexp(real, self.row + self.at_rows(v_bin))
        own = segment_logsumexp(self.col + v[..., : self.size], self.col_index, self.count)
        return torch.cat([real, torch.logaddexp(own, self.corner + v_bin)], -1)

    # The plan

    def log_plan(self, u: Tensor, v: Tensor) -> Vectors:
        """log P on the dustbin's column, row and corner."""
        return (
            self.row + u[..., : self.length] + self.at_rows(v[..., self.size :]),
            self.col + v[..., : self.size] + self.at_cols(u[..., self.length :]),
            self.corner + u[..., self.length :] + v[..., self.size :],
        )

    def complete_rows(self, real: Tensor, plan: Vectors, y: Tensor) -> Tensor:
        """P y `[N, H, L+G]` from its real part."""
        column, row, corner = plan
        y_bin = y[..., self.size :]
        own = self.sum_cols(row * y[..., : self.size]) + corner * y_bin
        return torch.cat([real + column * self.at_rows(y_bin), own], -1)

    def complete_cols(self, real: Tensor, plan: Vectors, x: Tensor) -> Tensor:
        """P^T x `[N, H, S+G]` from its real part."""
        column, row, corner = plan
        x_bin = x[..., self.length :]
        own = self.sum_rows(column * x[..., : self.length]) + corner * x_bin
        return torch.cat([real + row * self.at_cols(x_bin), own], -1)

    def times_exp(self, log_plan: Vectors, factor: Factor) -> Vectors:
        """The factor P * exp(row_i + col_j) on column, row and corner."""
        row, row_bin = factor.row[..., : self.length], factor.row[..., self.length :]
        col, col_bin = factor.col[..., : self.size], factor.col[..., self.size :]
        column, line, corner = log_plan
        exponents = row + self.at_rows(col_bin), col + self.at_cols(row_bin), row_bin + col_bin
        return (column + exponents[0]).exp(), (line + exponents[1]).exp(), (corner + exponents[2]).exp()

    def score_cotangent(self, log_plan: Vectors, to_bin: Tensor, from_bin: Tensor, field: Field) -> Vectors:
        """dS on column, row and corner, for D = `to_bin`, `from_bin` and 0 there."""
        column, row, corner = (x.exp() for x in log_plan)
        total = [column * to_bin, row * from_bin, torch.zeros_like(corner)]
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
        return total[0], total[1], total[2]

    # Between tokens and the dustbin of their problem

    def at_rows(self, x: Tensor) -> Tensor:
        """`[N, H, G]` read at the dustbin of each row, `[N, H, L]`."""
        return by_segment(x, self.row_index, self.length)

    def at_cols(self, x: Tensor) -> Tensor:
        return by_segment(x, self.col_index, self.size)

    def sum_rows(self, x: Tensor) -> Tensor:
        """`[N, H, L]` summed over each problem, `[N, H, G]`."""
        return segment_sum(x, self.row_index, self.count)

    def sum_cols(self, x: Tensor) -> Tensor:
        return segment_sum(x, self.col_index, self.count)


def segment_logsumexp(x: Tensor, index: Tensor | None, count: int) -> Tensor:
    """LSE over the last dimension by segment, `[..., n]` to `[..., count]`; -inf for an empty segment."""
    if index is None or count == 1:
        return torch.logsumexp(x, -1, keepdim=True)
    index = index.expand_as(x)
    top = x.new_full((*x.shape[:-1], count), -torch.inf).scatter_reduce(-1, index, x, "amax")
    safe = top.masked_fill(top == -torch.inf, 0.0)
    return segment_sum((x - safe.gather(-1, index)).exp(), index, count).log() + safe
