"""The O(n) feasibility condition against linear programs, and its largest flow against a maximum-flow program."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from torch_sinkhorn_attn import Dustbin, sinkhorn_plan
from torch_sinkhorn_attn.feasibility import Marginals, check_interior, check_lines, greedy_flow, monotone_hull

D = torch.float64


def constraint_matrix(support: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Row and column sums of a vector of the support's entries."""
    rows, cols = support.nonzero(as_tuple=True)
    count = len(rows)
    a, b = np.zeros((support.shape[0], count)), np.zeros((support.shape[1], count))
    a[rows.numpy(), range(count)] = 1
    b[cols.numpy(), range(count)] = 1
    return a, b


def has_interior(support: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether some plan with these marginals is positive on the whole support: maximise its smallest entry."""
    rows, cols = constraint_matrix(support)
    count = rows.shape[1]
    equal = np.hstack([np.vstack([rows, cols]), np.zeros((sum(support.shape), 1))])
    at_least = np.hstack([-np.eye(count), np.ones((count, 1))])  # t <= x
    result = linprog(
        [0.0] * count + [-1.0], A_ub=at_least, b_ub=[0.0] * count, A_eq=equal,
        b_eq=np.concatenate([a.numpy(), b.numpy()]), bounds=[(None, None)] * count + [(None, 1.0)],
    )  # fmt: skip
    return result.status == 0 and -result.fun > 1e-7


def intervals(g: torch.Generator, n: int, m: int) -> tuple[Tensor, Tensor]:
    lo = torch.randint(0, m, (n,), generator=g).sort().values
    hi = torch.maximum(torch.randint(1, m + 1, (n,), generator=g).sort().values, lo + 1)
    if torch.rand(1, generator=g) < 0.7:
        lo[0], hi[-1] = 0, m
    return lo, hi.cummax(0).values


def marginals(a: Tensor, b: Tensor, lo: Tensor, hi: Tensor) -> Marginals:
    column = torch.arange(len(b))
    covered = ((column >= lo[:, None]) & (column < hi[:, None])).any(0)
    return Marginals(*(x[None, None] for x in (a, b, lo, hi, covered)), "window=...")


def accepts(m: Marginals) -> bool:
    try:
        check_lines(m)
        check_interior(m)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("start", range(0, 300, 75))
def test_condition_agrees_with_linear_programs(start: int) -> None:
    """Integer masses make ties, the hard cases, common."""
    feasible = 0
    for seed in range(start, start + 75):
        g = torch.Generator().manual_seed(seed)
        n, m = (int(torch.randint(1, 7, (1,), generator=g)) for _ in range(2))
        lo, hi = intervals(g, n, m)
        a = torch.randint(1, 4, (n,), generator=g).to(D)
        b = torch.randint(1, 4, (m,), generator=g).to(D)
        if seed % 3:
            b = b * a.sum() / b.sum()
        else:  # equal totals in integers: move the difference to the longer end
            a[-1] += max(0.0, float(b.sum() - a.sum()))
            b[-1] += max(0.0, float(a.sum() - b.sum()))
        column = torch.arange(m)
        support = (column >= lo[:, None]) & (column < hi[:, None])
        truth = has_interior(support, a, b)
        feasible += truth
        assert accepts(marginals(a, b, lo, hi)) == truth, (seed, lo, hi, a, b)
    assert 8 < feasible < 67  # both outcomes are drawn


@pytest.mark.parametrize("seed", range(40))
def test_greedy_flow_is_a_largest_flow(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    n, m = (int(torch.randint(1, 7, (1,), generator=g)) for _ in range(2))
    lo, hi = intervals(g, n, m)
    a, b = torch.rand(n, generator=g, dtype=D), torch.rand(m, generator=g, dtype=D)
    given = marginals(a, b, lo, hi)
    column = torch.arange(m)
    rows, cols = constraint_matrix((column >= lo[:, None]) & (column < hi[:, None]))
    best = linprog(-np.ones(rows.shape[1]), A_ub=np.vstack([rows, cols]), b_ub=np.concatenate([a.numpy(), b.numpy()]))
    assert abs(greedy_flow(given, *monotone_hull(given)).sum().item() + best.fun) < 1e-9


def refused(**options) -> str:
    n, m = options.pop("n", 8), options.pop("m", 8)
    q, k = torch.randn(1, n, 4), torch.randn(1, m, 4)
    mask = options.pop("mask", None)
    with pytest.raises(ValueError) as error:
        sinkhorn_plan(q, k, mask, **options)
    return str(error.value)


@pytest.mark.parametrize("window", [(-1, 0), (0, -1), (3, 0), (0, 3)])
def test_one_sided_windows_force_the_identity(window) -> None:
    message = refused(window=window)
    assert f"window={window}" in message and "identity" in message and "dustbin" in message and "relaxation" in message


@pytest.mark.parametrize("lower", [True, False])
def test_triangular_masks_force_the_identity(lower: bool) -> None:
    mask = torch.ones(8, 8, dtype=torch.bool)
    message = refused(mask=mask.tril() if lower else mask.triu())
    assert "attn_mask" in message and "identity" in message
    assert "attn_mask" in refused(mask=torch.zeros(8, 8).masked_fill(~mask.tril(), -torch.inf))


def test_the_identity_itself_and_bands_are_fine() -> None:
    x = torch.randn(1, 8, 4)
    assert torch.allclose(sinkhorn_plan(x, x, window=(0, 0))[0], torch.eye(8), atol=1e-6)
    assert torch.allclose(sinkhorn_plan(x, x, torch.eye(8).bool())[0], torch.eye(8), atol=1e-6)
    sinkhorn_plan(x, x, window=(1, 1))


def test_windows_that_leave_lines_bare() -> None:
    assert "leaves query" in refused(n=8, m=3, window=(0, 0))
    assert "leaves key" in refused(n=3, m=9, window=(0, 0))
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[0, :4] = False
    message = refused(mask=mask, window=(2, 2))
    assert "window=(2, 2) with attn_mask leaves query 0" in message


def test_masses_may_make_a_band_infeasible() -> None:
    heavy = torch.ones(8)
    heavy[0] = 50.0
    assert "hold mass" in refused(row_mass=heavy, window=(1, 1))


def test_causal_is_fine_with_dustbin_or_relaxation() -> None:
    x = torch.randn(1, 8, 4)
    for options in ({"dustbin": Dustbin(0.0, 0.0)}, {"relaxation": 1.0}):
        plan = sinkhorn_plan(x, x, window=(-1, 0), **options)
        assert torch.isfinite(plan).all() and (plan[0, :8, :8].triu(1) == 0).all()


def test_dustbin_capacities_must_leave_room() -> None:
    message = refused(
        dustbin=Dustbin(0.0, 0.0, col_capacity=0.5, row_capacity=0.5),
        window=(0, 0),
        n=8,
        m=8,
        row_mass=torch.linspace(0.5, 1.5, 8),
    )
    assert "capacities leave" in message and "raise row_capacity" in message
    x = torch.randn(1, 8, 4)
    plan = sinkhorn_plan(x, x, window=(0, 0), dustbin=Dustbin(0.0, 0.0, col_capacity=0.5), base_iters=4000)
    assert torch.allclose(plan.sum(-1)[0], torch.tensor([1.0] * 8 + [0.5]), atol=1e-4)
