"""Windows around centres given as data: against their definition, beside lengths, segments and causality, and what is
refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_sinkhorn_attn import Dustbin, certify, sinkhorn_attention, sinkhorn_plan
from torch_sinkhorn_attn.problem.arguments import prepare
from torch_sinkhorn_attn.problem.looking import set_checks

D = torch.float64
ENGINES = ("reference", "tiled", "cpu")


def tokens(length: int, size: int, *batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(*batch, 2, n, 5, generator=g, dtype=D) for n in (length, size, size))
    return q, k, v


def support_of(centers: Tensor, window: tuple[int, int], length: int, size: int, **options: Any) -> Tensor:
    """`[N, L, S]` bool: the pairs between active tokens that a problem supports, by its rows; its columns agree."""
    q, k, _ = tokens(length, size, *centers.shape[:-1])
    problem = prepare(q, k, None, window=window, window_centers=centers, relaxation=1.0, **options).problem
    s, row, col = problem.support, torch.arange(length)[:, None], torch.arange(size)
    by_rows = (col >= s.row_lo[..., None]) & (col < s.row_hi[..., None])
    active = (problem.marginals.log_row_mass[:, 0, :, None] > -torch.inf) & (
        problem.marginals.log_col_mass[:, 0, None] > -torch.inf
    )
    by_cols = (row >= s.col_lo[:, None]) & (row < s.col_hi[:, None])
    assert bool((by_cols | ~(by_rows & active)).all())
    for n, j in by_rows.any(1).nonzero().tolist():  # and no interval of a column is longer than its rows make it
        rows = by_rows[n, :, j].nonzero()[:, 0]
        assert (int(s.col_lo[n, j]), int(s.col_hi[n, j])) == (int(rows.min()), int(rows.max()) + 1)
    return by_rows & active


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8])
@pytest.mark.parametrize("window", [(0, 0), (2, 1), (-1, 3), (4, -1), (50, 50)])
def test_a_window_is_that_around_its_centres(window: tuple[int, int], kind: torch.dtype) -> None:
    g = torch.Generator().manual_seed(sum(window))
    centers = (torch.rand(3, 23, generator=g, dtype=D) * 34 - 2).sort(-1).values
    centers = centers.clamp(min=0).to(kind) if kind == torch.uint8 else centers.to(kind)
    distance = torch.arange(30, dtype=D) - centers.double()[..., None]
    expected = torch.ones(3, 23, 30, dtype=torch.bool)
    for side, away in zip(window, (-distance, distance), strict=True):
        expected &= (away <= side) if side >= 0 else True
    assert torch.equal(support_of(centers, window, 23, 30), expected)


@pytest.mark.parametrize("lengths", [(7, 7), (7, 12), (12, 7), (129, 64), (64, 129)])
@pytest.mark.parametrize("window", [(0, 0), (1, 1), (3, 0), (-1, 2)])
def test_centres_of_the_diagonal_are_the_default(lengths: tuple[int, int], window: tuple[int, int]) -> None:
    """Their places are multiples of 1/(2 n), which floats do not hold: here twice n is a power of two, or n = m."""
    n, m = lengths
    if n != m and n & (n - 1):
        n = 2 ** (n.bit_length() - 1)
    centers = (torch.arange(n, dtype=D) + 0.5) * m / n - 0.5
    q, k, v = tokens(n, m)
    for engine in ENGINES:
        options: dict[str, Any] = {"window": window, "relaxation": 1.0, "engine": engine}
        expected = sinkhorn_attention(q, k, v, **options)
        assert torch.equal(sinkhorn_attention(q, k, v, window_centers=centers, **options), expected)


def test_beside_lengths_segments_and_causality() -> None:
    centers = torch.arange(12).mul(10).div(12, rounding_mode="floor").expand(2, -1)
    near = (torch.arange(10) - centers[..., None]).abs() <= 2
    rows, cols = torch.arange(12)[:, None], torch.arange(10)
    lengths = {"query_lengths": torch.tensor([12, 7]), "key_lengths": torch.tensor([9, 10])}
    held = (rows < lengths["query_lengths"][:, None, None]) & (cols < lengths["key_lengths"][:, None, None])
    assert torch.equal(support_of(centers, (2, 2), 12, 10, **lengths), near & held)
    ids = torch.tensor([0] * 4 + [-1] + [1] * 7).expand(2, -1), torch.tensor([0] * 5 + [1] * 5).expand(2, -1)
    together = ids[0][..., None] == ids[1][:, None]
    segments = dict(zip(("query_segment_ids", "key_segment_ids"), ids, strict=True))
    assert torch.equal(support_of(centers, (2, 2), 12, 10, **segments), near & together)
    assert torch.equal(support_of(centers, (2, 2), 12, 10, is_causal=True), near & (cols <= rows))
    square = torch.arange(12).expand(1, -1) + 1
    below = ((torch.arange(12) - square[..., None]).abs() <= 3) & (torch.arange(12) <= rows)
    assert torch.equal(support_of(square, (3, 3), 12, 12, is_causal=True), below)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_plan_is_that_of_the_pairs_as_a_mask(engine: str) -> None:
    """Every token has a pair, so a mask makes none inactive, and the balanced problems are one."""
    q, k, v = tokens(40, 36, 2)
    line = torch.tensor([0.0, 0.6, 1.4, 1.4]).repeat(10).cumsum(0)
    centers = torch.stack([line, torch.linspace(0, 36, 40)]).double()
    keep = (torch.arange(36) - centers[..., None]).abs() <= 4
    assert bool(keep.any(-1).all()) and bool(keep.any(-2).all())
    with_mask = sinkhorn_plan(q, k, keep[:, None], engine=engine)
    plan = sinkhorn_plan(q, k, window=(4, 4), window_centers=centers, engine=engine)
    torch.testing.assert_close(plan, with_mask, rtol=1e-12, atol=1e-14)
    output, aux = sinkhorn_attention(
        q, k, v, window=(4, 4), window_centers=centers, engine=engine, return_aux=True, base_iters=400
    )
    expected = sinkhorn_attention(q, k, v, keep[:, None], engine=engine, base_iters=400)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-14)
    assert aux.col_residual.max() < 1e-3


def test_what_lies_off_the_line_is_left_to_the_dustbin() -> None:
    q, k, v = tokens(20, 60)
    options: dict[str, Any] = {"window": (2, 2), "window_centers": torch.arange(20) + 5, "dustbin": Dustbin(-1.0, 0.5)}
    for engine in ENGINES:
        _, aux = sinkhorn_attention(q, k, v, engine=engine, return_aux=True, base_iters=300, **options)
        assert aux.col_dustbin is not None and torch.allclose(aux.col_dustbin[:, 27:], torch.ones((), dtype=D))
        assert aux.row_residual.max() < 1e-10 and bool((aux.row_dustbin < 0.9).any())


@pytest.mark.slow
def test_centres_are_data() -> None:
    """One compiled program for other centres, and the same numbers."""
    q, k, v = tokens(33, 33, 1)
    seen: list[int] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(1)
        return graph

    def attend(centers: Tensor) -> Tensor:
        return sinkhorn_attention(q, k, v, window=(6, 6), window_centers=centers, relaxation=1.0)

    compiled = torch.compile(attend, backend=count, fullgraph=True)
    for shift in (0.0, 3.5, -40.0, 90.0):
        centers = torch.arange(33.0) + shift
        torch.testing.assert_close(compiled(centers), attend(centers), rtol=1e-12, atol=1e-14)
    assert len(seen) == 1


def test_unchecked_centres_keep_intervals_monotone_and_show_nan() -> None:
    """What a device that nobody may look at would get: a centre that falls counts as the highest before it, and a query
    whose centre is NaN has no key."""
    q, k, v = tokens(9, 9)
    wild = torch.tensor([0.0, 5.0, 2.0, torch.nan, 6.0, -torch.inf, 7.0, 1e30, torch.inf])
    tame = torch.tensor([0.0, 5.0, 5.0, 5.0, 6.0, 6.0, 7.0, 1e7, 1e7])
    set_checks("never")
    try:
        for engine in ENGINES:
            options: dict[str, Any] = {"window": (2, 2), "relaxation": 1.0, "engine": engine}
            found = sinkhorn_attention(q, k, v, window_centers=wild, **options)
            expected = sinkhorn_attention(q, k, v, window_centers=tame, **options)
            assert bool(torch.isfinite(found).all()) and bool((found[:, 3] == 0).all())
            assert bool((found[:, 7:] == 0).all()) and bool((expected[:, 7:] == 0).all())
    finally:
        set_checks("auto")


def test_certificates_take_them() -> None:
    q, k, _ = tokens(12, 12)
    a = certify(q, k, window=(2, 2), window_centers=torch.arange(12.0))
    b = certify(q, k, window=(2, 2))
    assert torch.equal(torch.as_tensor(a.rate), torch.as_tensor(b.rate))


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no window": ({"window": None, "window_centers": torch.arange(6)}, ValueError, "given without a window"),
    "falling": (
        {"window_centers": torch.tensor([0.0, 1, 2, 1.5, 4, 5])}, ValueError,
        r"window_centers falls from 2 to 1\.5 at batch 0, query 3; .* torch\.cummax",
    ),
    "falling in the second": (
        {"window_centers": torch.stack([torch.arange(6), 5 - torch.arange(6)])}, ValueError, r"at batch 1, query 1",
    ),
    "NaN": ({"window_centers": torch.tensor([0, 1, torch.nan, 3, 4, 5])}, ValueError, r"is nan at batch 0, query 2"),
    "infinite": ({"window_centers": torch.tensor([0, 1, 2, 3, 4, torch.inf])}, ValueError, r"is inf at .* query 5"),
    "half": ({"window_centers": torch.arange(6).half()}, TypeError, r"float32, float64 or .* torch\.float16"),
    "bool": ({"window_centers": torch.ones(6, dtype=torch.bool)}, TypeError, r"window_centers must .* got torch\.bool"),
    "list": ({"window_centers": [0, 1, 2, 3, 4, 5]}, TypeError, r"window_centers must hold .* got list"),
    "shape": ({"window_centers": torch.arange(5)}, ValueError, r"window_centers has shape \(5,\)"),
    "gradient": (
        {"window_centers": torch.arange(6.0).requires_grad_()}, ValueError, r"constant.* window_centers\.detach\(\)",
    ),
    "queries without a key": (
        {"window_centers": torch.tensor([0, 1, 2, 3, 40, 41])}, ValueError,
        r"window=\(2, 2\) around window_centers leaves query 4 .* move window_centers",
    ),
    "keys without a query": (
        {"window_centers": torch.zeros(6)}, ValueError, r"around window_centers leaves key 3 .* uncovered",
    ),
    "too many for their keys": (
        {"window": (0, 0), "window_centers": torch.tensor([0, 0, 1, 2, 4, 5]), "key_lengths": torch.tensor([6, 6])},
        ValueError, "window_centers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    options, error, words = BAD[name]
    q, k, v = tokens(6, 6, 2)
    with pytest.raises(error) as found:
        sinkhorn_attention(q, k, v, **{"window": (2, 2)} | options)
    assert re.search(words, str(found.value)), found.value


def test_inactive_queries_need_no_centre() -> None:
    q, k, v = tokens(6, 6, 2)
    centers = torch.tensor([[0, 1, 2, 3, torch.nan, -torch.inf], [0, 1, 2, 3, 4, 5.0]])
    lengths = torch.tensor([4, 6])
    for engine in ENGINES:
        options: dict[str, Any] = {"query_lengths": lengths, "key_lengths": lengths, "engine": engine}
        found = sinkhorn_attention(q, k, v, window=(2, 2), window_centers=centers, **options)
        expected = sinkhorn_attention(q, k, v, window=(2, 2), **options)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
