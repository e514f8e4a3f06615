"""Existence of a plan: against linear programs, all cuts, maximum flows, and in any order of the tokens."""

from __future__ import annotations

import re

import cuts
import numpy as np
import pytest
import torch
from marks import slow_after
from scipy.optimize import linprog
from torch import Tensor

from torch_sinkhorn_attn import Dustbin, sinkhorn_attention, sinkhorn_plan
from torch_sinkhorn_attn.problem.bits import integers, packed, transposed
from torch_sinkhorn_attn.problem.feasibility import flow as transport_flow, masks as mask_feasibility
from torch_sinkhorn_attn.problem.feasibility.intervals import IntervalProblem, Request, check_intervals, interval_flow

D = torch.float64


def accepts(keep: Tensor, a: Tensor, b: Tensor, **options) -> bool:
    """Whether the public function takes the mask and masses."""
    x = torch.zeros(1, max(keep.shape), 2)
    try:
        sinkhorn_attention(
            x[:, : len(a)], x[:, : len(b)], x[:, : len(b)], keep, row_mass=a, col_mass=b, base_iters=0, **options
        )
    except ValueError as error:
        assert "no balanced plan" in str(error)
        return False
    return True


@pytest.mark.parametrize("start", slow_after(1, range(0, 120, 40)))
def test_masks_agree_with_linear_programs(start: int) -> None:
    """Masses over twelve decades, ties, and rounded sums; `benchmarks/feasibility.py` tries thousands."""
    found = []
    for seed in range(start, start + 40):
        _, keep, a, b = cuts.draw(seed, 5)
        found.append(cuts.has_plan_by_programs(keep, a, b))
        assert accepts(keep, a, b) == found[-1], seed
    assert 3 < sum(found) < 37  # both outcomes are drawn


@pytest.mark.slow
@pytest.mark.parametrize("start", slow_after(1, range(0, 300, 100)))
def test_masks_agree_with_all_cuts_in_any_order(start: int) -> None:
    g = torch.Generator().manual_seed(start)
    for seed in range(start, start + 100):
        kind, keep, a, b = cuts.draw(seed)
        rows, cols = (torch.randperm(n, generator=g) for n in keep.shape)
        truth = cuts.has_plan_by_enumeration(keep, a, b)
        assert accepts(keep, a, b) == truth, (seed, kind)
        assert accepts(keep[rows][:, cols], a[rows], b[cols]) == truth, (seed, kind)


def intervals(g: torch.Generator, n: int, m: int) -> tuple[Tensor, Tensor]:
    lo = torch.randint(0, m, (n,), generator=g).sort().values
    hi = torch.maximum(torch.randint(1, m + 1, (n,), generator=g).sort().values, lo + 1)
    if torch.rand(1, generator=g) < 0.7:
        lo[0], hi[-1] = 0, m
    return lo, hi.cummax(0).values


@pytest.mark.slow
@pytest.mark.parametrize("start", slow_after(1, range(0, 900, 300)))
def test_intervals_and_masks_decide_alike(start: int) -> None:
    """Monotone intervals are decided by sums in O(n); written as masks and shuffled, by flows. With idle tokens."""
    found = []
    for seed in range(start, start + 300):
        g = torch.Generator().manual_seed(seed)
        n, m = (int(torch.randint(1, 9, (1,), generator=g)) for _ in range(2))
        lo, hi = intervals(g, n, m)
        keep = (torch.arange(m) >= lo[:, None]) & (torch.arange(m) < hi[:, None])
        a, b = cuts._masses(cuts.KINDS[seed % 5], keep, g)
        live = keep & (a > 0)[:, None] & (b > 0)
        if not (live.any(1) == (a > 0)).all() or not (live.any(0) == (b > 0)).all() or not live.any():
            continue
        m_ = IntervalProblem(*(x[None, None] for x in (a, b, lo, hi, live.any(0))), Request((1, 1), False, True))
        try:
            check_intervals(m_)
            found.append(True)
        except ValueError:
            found.append(False)
        active = live.any(1).nonzero()[:, 0], live.any(0).nonzero()[:, 0]
        rows, cols = (x[torch.randperm(len(x), generator=g)] for x in active)
        assert accepts(live[rows][:, cols], a[rows], b[cols]) == found[-1], (seed, lo, hi, a, b)
    assert 30 < sum(found) < len(found) - 30


@pytest.mark.parametrize("seed", range(60))
def test_largest_flows(seed: int) -> None:
    """Along intervals by composed functions, along pairs by augmenting paths, and by a linear program."""
    g = torch.Generator().manual_seed(seed)
    n, m = (int(torch.randint(1, 9, (1,), generator=g)) for _ in range(2))
    lo, hi = intervals(g, n, m)
    a, b = torch.rand(n, generator=g, dtype=D), torch.rand(m, generator=g, dtype=D)
    a[torch.rand(n, generator=g) < 0.2] = 0
    keep = (torch.arange(m) >= lo[:, None]) & (torch.arange(m) < hi[:, None])
    given = IntervalProblem(*(x[None, None] for x in (a, b, lo, hi, keep.any(0))), Request((1, 1), False, True))
    pairs = keep.nonzero()
    matrix = np.zeros((n + m, len(pairs)))
    matrix[pairs[:, 0], range(len(pairs))] = matrix[n + pairs[:, 1], range(len(pairs))] = 1
    best = -linprog(-np.ones(len(pairs)), A_ub=matrix, b_ub=torch.cat([a, b]).numpy()).fun
    assert abs(interval_flow(given).sum().item() - best) < 1e-9
    rows = integers(*packed(keep))
    row_mass, col_mass = transport_flow.dyadic(a.tolist(), b.tolist())
    graph = transport_flow.Graph(rows, transposed(rows, m))
    left = sum(x for _, x in transport_flow.left_over(graph, row_mass, col_mass))
    unit = a.sum().item() / max(1, sum(row_mass))
    assert abs((sum(row_mass) - left) * unit - best) < 1e-9


def band(n: int, width: int) -> Tensor:
    i = torch.arange(n)
    return (i[:, None] - i).abs() <= width


@pytest.mark.parametrize("mass", [1e-12, 1e-6, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_one_light_token_is_no_tie(mass: float, dtype: torch.dtype) -> None:
    """Slack of one token is small against the total, and large against nothing."""
    n = 8
    x = torch.randn(1, 1, n, 4, dtype=dtype)
    for place in (0, 3, n - 1):
        a = torch.ones(n, dtype=dtype)
        a[place] = mass
        shuffle = torch.randperm(n)
        for options in (
            {"attn_mask": torch.ones(n, n, dtype=torch.bool)},
            {"attn_mask": torch.zeros(n, n, dtype=dtype)},
            {"attn_mask": band(n, 3)},
            {"window": (3, 3)},
            {"window": (3, 3), "attn_mask": torch.ones(n, n, dtype=torch.bool)},
        ):
            plan = sinkhorn_plan(x, x, row_mass=a, col_mass=a, base_iters=600, **options)
            assert torch.allclose(plan.sum(-2)[0, 0], a, atol=1e-4)
        plan = sinkhorn_plan(x, x, band(n, 3)[shuffle][:, shuffle], row_mass=a[shuffle], col_mass=a[shuffle])
        assert torch.isfinite(plan).all()


def test_a_tie_is_a_tie_whichever_way_its_sums_were_rounded() -> None:
    """0.1 + 0.2 against 0.3, either more or less by a unit in the last place: nothing is left for the second query."""
    keep = torch.tensor([[True, True, False], [True, True, True]])
    for first in (0.3, 0.1 + 0.2):
        a, b = torch.tensor([first, 1.0], dtype=D), torch.tensor([0.1, 0.2, 1.0], dtype=D)
        assert (
            not accepts(keep, a, b) and not accepts(keep.T, b, a) and not accepts(keep.flip(0, 1), a.flip(0), b.flip(0))
        )
        assert accepts(keep, torch.tensor([first - 1e-13, 1 + 1e-13], dtype=D), b)
        apart = torch.tensor([[True, True, False], [False, False, True]])
        assert accepts(apart, a, b) and not accepts(apart, torch.tensor([first - 1e-13, 1 + 1e-13], dtype=D), b)


def plan_free_masks(n: int = 20) -> dict[str, Tensor]:
    crowd = torch.ones(n, n, dtype=torch.bool)
    crowd[: n // 2, n // 4 :] = False
    pair = torch.ones(n, n, dtype=torch.bool)
    pair[[3, 5]] = False
    pair[[3, 5], 2] = True
    tie = torch.ones(n, n, dtype=torch.bool)
    tie[: n // 2, n // 2 :] = False
    return {"crowd": crowd, "one key for two": pair, "tie": tie, "causal": tie.new_ones(n, n).tril()}


@pytest.mark.parametrize("name", list(plan_free_masks()))
def test_a_mask_without_a_plan_is_refused_in_any_order(name: str) -> None:
    mask = plan_free_masks()[name]
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        rows, cols = (torch.randperm(len(mask), generator=g) for _ in range(2))
        for keep in (mask, mask.T, mask[rows][:, cols], mask.T[rows][:, cols]):
            message = refused(n=20, m=20, mask=keep)
            assert message.startswith("attn_mask has no balanced plan") and "window" not in message
            assert "let attn_mask keep more pairs" in message and "mass" in message
    two = refused(n=20, m=20, mask=plan_free_masks()["one key for two"])
    assert "2 queries (3, 5) hold mass 2 but reach key 2 of mass 1 only" in two


@pytest.mark.parametrize("spare", [0, 1, 2])
@pytest.mark.parametrize(("n", "m"), [(20, 20), (20, 30), (30, 20), (1, 6), (7, 1)])
def test_slack_of_whole_tokens(n: int, m: int, spare: int) -> None:
    """Half of the queries reach their share of the keys, and `spare` more: only those leave anything for the rest."""
    keep = torch.ones(n, m, dtype=torch.bool)
    half, share = n // 2, m // 2 if n % 2 == 0 else 0
    if half == 0 or share == 0:
        sinkhorn_plan(torch.randn(1, n, 4), torch.randn(1, m, 4), keep)
        return
    keep[:half, share + spare :] = False
    rows, cols = torch.randperm(n), torch.randperm(m)
    q, k = torch.randn(1, n, 4), torch.randn(1, m, 4)
    if spare:
        sinkhorn_plan(q, k, keep[rows][:, cols])
    else:
        assert "mass" in refused(n=n, m=m, mask=keep[rows][:, cols])


@pytest.mark.slow
@pytest.mark.parametrize("engine", slow_after(1, ["tiled", "reference", None]))
def test_what_is_accepted_converges(engine: str | None) -> None:
    """Sparse random masks in random order: those accepted reach their marginals, on every engine."""
    accepted = 0
    for seed in range(15):
        g = torch.Generator().manual_seed(seed)
        n, m = (int(torch.randint(2, 9, (1,), generator=g)) for _ in range(2))
        q, k = torch.randn(1, n, 4, generator=g, dtype=D), torch.randn(1, m, 4, generator=g, dtype=D)
        keep = torch.rand(n, m, generator=g) < 0.5
        try:
            plan = sinkhorn_plan(q, k, keep, base_iters=1000, engine=engine)[0]
        except ValueError:
            continue
        accepted += 1
        active = keep.any(0)
        b = keep.any(1).sum() / active.sum()
        assert (plan.sum(-2)[active] - b).abs().max() < 1e-3, seed
    assert 3 < accepted < 15


def test_masks_beside_lengths_segments_and_windows() -> None:
    """The mask leaves queries 3 and 5 of each problem one key; elsewhere everything is kept."""
    n = 16
    mask = torch.ones(n, n, dtype=torch.bool)
    mask[[3, 5]] = False
    mask[[3, 5], 2] = True
    ids = torch.tensor([0] * 8 + [1] * 8)
    for options in (
        {"query_lengths": torch.tensor(9), "key_lengths": torch.tensor(9)},
        {"query_segment_ids": ids, "key_segment_ids": ids},
        {"window": (5, 5)},
        {"window": (5, 5), "query_segment_ids": ids, "key_segment_ids": ids},
    ):
        message = refused(n=n, m=n, mask=mask, **options)
        assert "2 queries (3, 5) hold mass 2" in message and ("window" in message) == ("window" in options)
    x = torch.randn(1, n, 4)
    short = {"query_lengths": torch.tensor(3), "key_lengths": torch.tensor(9)}
    sinkhorn_plan(x, x, mask, **short)  # queries 3 and 5 are padding
    apart = torch.block_diag(torch.ones(3, 2), torch.ones(5, 6)).bool()
    assert "3 queries (0 to 2) and 2 keys (0 to 1) reach only each other, but hold mass 3 and 2" in refused(mask=apart)
    even = torch.block_diag(torch.ones(3, 3), torch.ones(5, 5)).bool()
    order = torch.randperm(8)
    sinkhorn_plan(x[:, :8], x[:, :8], even[order][:, torch.randperm(8)])


def test_a_batch_element_without_tokens_has_no_pairs_to_read() -> None:
    x, mask = torch.randn(2, 1, 9, 4), torch.rand(9, 9) < 0.9
    mask |= torch.eye(9, dtype=torch.bool).roll(1, 0) | torch.eye(9, dtype=torch.bool)
    lengths = torch.tensor([9, 0])
    apart = torch.stack([torch.zeros(9, dtype=torch.int64), torch.full((9,), -1)])
    for options in (
        {"window": (8, 8), "query_lengths": lengths, "key_lengths": lengths},
        {"query_segment_ids": apart, "key_segment_ids": apart},
    ):
        out, aux = sinkhorn_attention(x, x, x, mask, return_aux=True, base_iters=200, **options)
        torch.testing.assert_close(out[:1], sinkhorn_attention(x[:1], x[:1], x[:1], mask, base_iters=200))
        assert (out[1] == 0).all() and aux.verdict() == "converged"


@pytest.mark.parametrize("unit", [1e-320, 1e-307, 1e-295, 1e-200, 1.0, 1e300, 3e307])
def test_existence_does_not_depend_on_the_unit_of_mass(unit: float) -> None:
    x, mass = torch.randn(1, 6, 4, dtype=D), torch.tensor([1, 2, 3, 3, 2, 1], dtype=D)
    ids = torch.arange(6) // 3
    keep = (torch.arange(6)[:, None] - torch.arange(6)).abs() < 3
    for options in ({"window": (1, 1)}, {"query_segment_ids": ids, "key_segment_ids": ids}, {"attn_mask": keep}):
        sinkhorn_plan(x, x, row_mass=mass * unit, col_mass=mass * unit, **options)
    with pytest.raises(ValueError, match="no balanced plan"):
        sinkhorn_plan(x, x, row_mass=mass * unit, col_mass=mass * unit, window=(0, 1))
    with pytest.raises(ValueError, match="no balanced plan"):
        sinkhorn_plan(x, x, keep.triu(), row_mass=mass * unit, col_mass=mass * unit)


def test_which_batch_element_and_head_is_named() -> None:
    q = torch.randn(2, 3, 6, 4)
    mask = torch.ones(2, 3, 6, 6, dtype=torch.bool)
    mask[1, 2, :2] = False
    mask[1, 2, :2, 4] = True
    with pytest.raises(ValueError, match=r"batch 1, head 2\): 2 queries \(0 to 1\) hold mass 2 but reach key 4"):
        sinkhorn_plan(q, q, mask)


def test_relaxed_on_one_side_nothing_but_lines_is_asked() -> None:
    mask = plan_free_masks()["crowd"]
    x = torch.randn(1, 20, 4)
    for relaxation in (1.0, (1.0, None), (None, 1.0)):
        assert torch.isfinite(sinkhorn_plan(x, x, mask, relaxation=relaxation)).all()


def test_dustbin_with_a_mask_in_any_order() -> None:
    """Ten queries reach five keys: five of their mass must find room in the dustbin column, and a little more."""
    mask, x = plan_free_masks()["crowd"], torch.randn(1, 20, 4)
    rows, cols = torch.randperm(20), torch.randperm(20)
    for keep in (mask, mask[rows][:, cols]):
        sinkhorn_plan(x, x, keep, dustbin=Dustbin(0.0, 0.0))
        sinkhorn_plan(x, x, keep, dustbin=Dustbin(0.0, 0.0, col_capacity=5.01))
        for capacity in (5.0, 4.9):
            message = refused(n=20, m=20, mask=keep, dustbin=Dustbin(0.0, 0.0, col_capacity=capacity))
            assert "can carry 15 at most" in message
    ids = torch.tensor([0] * 10 + [1] * 10)
    two = torch.ones(20, 20, dtype=torch.bool)
    two[10:15, 12:] = False
    packed_ids = {"query_segment_ids": ids, "key_segment_ids": ids}
    message = refused(n=20, m=20, mask=two, dustbin=Dustbin(0.0, 0.0, col_capacity=2.9), **packed_ids)
    assert "segment 1" in message and "can carry 7 at most" in message
    sinkhorn_plan(x, x, two, dustbin=Dustbin(0.0, 0.0, col_capacity=3.1), **packed_ids)


def test_a_problem_is_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads, batch elements and later calls that share mask and masses; another mask, or other masses, is another."""
    calls = []
    solve = transport_flow.blocking_cut
    monkeypatch.setattr(transport_flow, "blocking_cut", lambda *x: calls.append(1) or solve(*x))
    mask_feasibility._has_plan.clear()
    x, mask = torch.randn(2, 3, 6, 4), torch.ones(6, 6, dtype=torch.bool)
    mask[0, 0] = False
    for _ in range(2):
        sinkhorn_plan(x, x, mask)
        assert len(calls) == 1
    for count in (2, 3):
        sinkhorn_plan(x, x, mask, row_mass=torch.rand(6) + 0.5)
        assert len(calls) == count
    x = torch.randn(1, 1, 6, 4)
    sinkhorn_plan(x, x, mask.flip(0))
    assert len(calls) == 4
    padding = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    padding[..., 4:] = False
    x = torch.randn(2, 3, 6, 4)
    sinkhorn_plan(x, x, padding)
    sinkhorn_plan(x, x, padding.expand(2, 3, 6, 6).contiguous())
    assert len(calls) == 4  # whole keys: no flow is needed


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
    assert "query 0 holds mass 50 but reaches 2 keys (0 to 1) of mass" in refused(row_mass=heavy, window=(1, 1))


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


@pytest.mark.parametrize("less", [1e-3, 1e-6, 1e-9])
def test_a_refusal_shows_the_digits_in_which_masses_differ(less: float) -> None:
    keep = torch.ones(10, 5, dtype=torch.bool)
    keep[:7, 3:] = False  # seven queries reach three keys
    col_mass = torch.tensor([7 / 3 - less / 3] * 3 + [1.5 + less / 2] * 2, dtype=torch.float64)
    message = refused(n=10, m=5, mask=keep, row_mass=torch.ones(10, dtype=torch.float64), col_mass=col_mass)
    held, room = (float(x) for x in re.findall(r"mass ([\d.]+)", message)[:2])
    assert held == 7 and 0.3 * less < held - room < 3 * less
