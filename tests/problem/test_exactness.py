"""What feasibility is decided with is exact: rows of bits, sums over many decades, slack of next to nothing."""

from __future__ import annotations

import pytest
import torch
from marks import slow_after

from torch_sinkhorn_attn import sinkhorn_attention, sinkhorn_plan
from torch_sinkhorn_attn.problem.bits import from_members, integers, members, packed, transposed
from torch_sinkhorn_attn.problem.feasibility.exact_sums import ExactSums
from torch_sinkhorn_attn.problem.feasibility.intervals import IntervalProblem, Request, check_intervals

D = torch.float64


def test_bits_of_a_matrix() -> None:
    assert integers(*packed(torch.zeros(3, 0, dtype=torch.bool))) == [0, 0, 0]
    for n, m in ((1, 1), (3, 7), (5, 8), (9, 9), (64, 65), (2, 130)):
        matrix = torch.rand(n, m) < 0.5
        rows = integers(*packed(matrix))
        assert [list(members(row)) for row in rows] == [row.nonzero()[:, 0].tolist() for row in matrix]
        assert transposed(rows, m) == integers(*packed(matrix.T)) == [
            from_members(col.nonzero()[:, 0].tolist()) for col in matrix.T
        ]  # fmt: skip


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 16])
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_matrices_of_any_strides_are_packed(rows: int, columns: int) -> None:
    whole = torch.rand(rows + 3, columns + 3, generator=torch.Generator().manual_seed(0)) < 0.5
    part = whole[1 : rows + 1, 2 : columns + 2]
    views = [part, part.contiguous(), part.t().contiguous().t()]
    views += [part.contiguous().as_strided(part.shape, (1, 1))] * (rows == 1)
    for view in views:
        assert integers(*packed(view)) == [sum(1 << j for j, bit in enumerate(row) if bit) for row in part.tolist()]


def test_sums_are_exact() -> None:
    """Over a dozen decades, and where float64 loses the small ones."""
    a = torch.tensor([[[1.0, 1e-14, 3.0, 1e-13]]], dtype=D)
    sums = ExactSums(a, a.flip(-1))
    at = torch.tensor([[[1]]])
    assert float(sums.between(at, at + 1) * sums.unit) == pytest.approx(1e-14, rel=1e-6)
    whole = torch.tensor([[[0]]]), torch.tensor([[[4]]])
    assert float(sums.excess(whole, whole)) == 0.0
    shifted = sums.excess((at * 0, at + 1), (at + 1, at + 3))  # 1 + 1e-14 against 1e-14 + 1
    assert float(shifted) == 0.0


@pytest.mark.slow
def test_windows_over_millions_of_tokens() -> None:
    n = 1_000_001
    x = torch.zeros(1, 1, n, 1)
    sinkhorn_attention(x, x, x, window=(8, 8), base_iters=0, tail_iters=1)
    ids = (torch.arange(n) // 1000)[None]
    sinkhorn_attention(x, x, x, window=(8, 8), base_iters=0, tail_iters=1, query_segment_ids=ids, key_segment_ids=ids)
    with pytest.raises(ValueError, match="no balanced plan"):
        sinkhorn_attention(x, x, x, window=(8, 0), base_iters=0, tail_iters=1)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_ten_million_tokens_are_exact() -> None:
    n = 10_000_000
    a, index = torch.ones(1, 1, n, dtype=D), torch.arange(n)[None, None]
    lo, hi, request = (index - 1).clamp(min=0), (index + 2).clamp(max=n), Request((1, 1), False, True)
    check_intervals(IntervalProblem(a, a, lo, hi, a > 0, request))


@pytest.mark.parametrize("n", slow_after(2, [8, 1000, 1_000_000]))
@pytest.mark.parametrize("light", [1e-9, 1e-12])
def test_a_slack_of_next_to_nothing_in_many_tokens(n: int, light: float) -> None:
    """The last key but one has the mass of one query less or more than a little; all others have that of one."""
    a, index = torch.ones(1, 1, n, dtype=D), torch.arange(n)[None, None]
    lo, request = torch.zeros_like(index), Request((1, 1), False, True)
    hi = (index + 1).masked_fill(index == n - 1, n)
    lo = lo + index  # the identity, but for one more key of the last query but one
    hi[..., n - 2] = n
    for more, exists in ((light, True), (0.0, False), (-light, False)):
        b = a.clone()
        b[..., -2], b[..., -1] = 1 - more, 1 + more
        m = IntervalProblem(a, b, lo, hi, a > 0, request)
        if exists:
            check_intervals(m)
        else:
            with pytest.raises(ValueError, match="no balanced plan"):
                check_intervals(m)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_totals_may_differ_by_what_the_masses_dtype_rounds(dtype: torch.dtype) -> None:
    x = torch.randn(1, 40, 4, dtype=dtype)
    a, b = torch.rand(40), torch.rand(40)
    a, b = (a / a.sum()).to(dtype), (b / b.sum()).to(dtype)
    sinkhorn_plan(x, x, row_mass=a, col_mass=b)
    with pytest.raises(ValueError, match="needs equal totals"):
        sinkhorn_plan(x, x, row_mass=a, col_mass=b * 1.1)
    parts = torch.zeros(1, 40, 40, dtype=torch.bool)
    parts[:, :20, :20] = parts[:, 20:, 20:] = True
    halves = torch.rand(20)
    a = torch.cat([halves, halves]).to(dtype)
    order = torch.randperm(20)
    sinkhorn_plan(x, x, parts, row_mass=a, col_mass=torch.cat([halves[order], halves]).to(dtype))
