"""Centres found from a coarse plan: the way through it, and sequences with large insertions."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from torch_sinkhorn_attn import Dustbin, scout_centers, sinkhorn_attention
from torch_sinkhorn_attn.scout import monotone_way


def best_way(mass: Tensor) -> float:
    """The most that a monotone way gathers, by trying all of them."""
    n, m = mass.shape
    best = -float("inf")
    for moves in itertools.product(((0, 1), (1, 0), (1, 1)), repeat=n + m - 2):
        i = j = 0
        total = float(mass[0, 0])
        for down, right in moves:
            if (i, j) == (n - 1, m - 1):
                break
            i, j = i + down, j + right
            if i >= n or j >= m:
                break
            total += float(mass[i, j])
        if (i, j) == (n - 1, m - 1):
            best = max(best, total)
    return best


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1), (3, 3), (4, 3), (3, 5)])
def test_the_way_gathers_most(shape: tuple[int, int]) -> None:
    n, m = shape
    mass = torch.rand(6, n, m, generator=torch.Generator().manual_seed(n * m), dtype=torch.float64) - 0.3
    first, last = monotone_way(mass, torch.full((6,), n), torch.full((6,), m))
    assert bool((first[:, 0] == 0).all()) and bool((last[:, -1] == m - 1).all()) and bool((first <= last).all())
    assert bool(((first[:, 1:] - last[:, :-1]).clamp(0, 1) == first[:, 1:] - last[:, :-1]).all())
    column = torch.arange(m)
    on = (column >= first[..., None]) & (column <= last[..., None])
    for x, gathered in zip(mass, (mass * on).sum((1, 2)), strict=True):
        assert float(gathered) == pytest.approx(best_way(x), abs=1e-12)


def related(
    length: int, missing_queries: list[tuple[int, int]], missing_keys: list[tuple[int, int]], seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key tokens `[1, 1, n, 32]` of one sequence, noisy and each without some stretches, and where each
    query's partner lies among the keys, -1 where it has none."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randn(length, 32, generator=g)
    sides, places = [], []
    for missing in (missing_queries, missing_keys):
        keep = torch.ones(length, dtype=torch.bool)
        for start, end in missing:
            keep[start:end] = False
        sides.append(1.5 * (tokens[keep] + 0.5 * torch.randn(int(keep.sum()), 32, generator=g)))
        place = torch.full((length,), -1)
        place[keep] = torch.arange(int(keep.sum()))
        places.append(place)
    return sides[0][None, None], sides[1][None, None], places[1][places[0] >= 0]


INSERTIONS = {
    "queries lack a third": (1500, [(500, 1000)], []),
    "keys lack a third": (1500, [], [(500, 1000)]),
    "both, at both ends": (2000, [(0, 300), (1200, 1500)], [(700, 900), (1750, 2000)]),
    "twice": (2500, [(300, 800), (1500, 1900)], []),
}


@pytest.mark.parametrize("dustbin", [False, True])
@pytest.mark.parametrize("name", INSERTIONS)
def test_large_insertions_are_found(name: str, dustbin: bool) -> None:
    """The window of 32 around them holds nearly all partners; around the diagonal, few."""
    for seed in range(3):
        q, k, partner = related(*INSERTIONS[name], seed)
        n, m = q.shape[-2], k.shape[-2]
        centers = scout_centers(q, k, pool=16, dustbin=Dustbin(2.0, 2.0) if dustbin else None)[0]
        assert centers.shape == (n,) and centers.dtype == torch.float32
        assert bool((centers.diff() >= 0).all()) and centers.min() >= 0 and centers.max() <= m - 1
        diagonal = (torch.arange(n) + 0.5) * m / n - 0.5
        has, near = partner >= 0, [(x - partner).abs() <= 32 for x in (centers, diagonal)]
        assert near[0][has].float().mean() > 0.97, (seed, near[0][has].float().mean())
        assert near[1][has].float().mean() < 0.5


def test_the_band_around_them_gives_what_all_pairs_give() -> None:
    q, k, partner = related(*INSERTIONS["both, at both ends"], seed=1)
    options = {"dustbin": Dustbin(8.0, 8.0), "epsilon": 0.5, "base_iters": 100}
    v = torch.randn(1, 1, k.shape[-2], 8, generator=torch.Generator().manual_seed(3))
    dense = sinkhorn_attention(q, k, v, **options)
    centers = scout_centers(q, k)
    scouted = sinkhorn_attention(q, k, v, window=(48, 48), window_centers=centers, **options)
    diagonal = sinkhorn_attention(q, k, v, window=(48, 48), **options)
    has = partner >= 0
    errors = [float((x - dense)[..., has, :].norm() / dense[..., has, :].norm()) for x in (scouted, diagonal)]
    assert errors[0] < 0.2 and errors[1] > 0.7, errors


def test_padding_changes_nothing() -> None:
    q, k, _ = related(700, [(200, 400)], [], seed=0)
    n, m = q.shape[-2], k.shape[-2]
    alone = scout_centers(q, k, pool=10)
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 123), value=float("nan")).expand(2, -1, -1, -1) for x in (q, k)]
    lengths = {"query_lengths": torch.tensor([n, 0]), "key_lengths": torch.tensor([m, m])}
    found = scout_centers(*padded, pool=10, **lengths)
    torch.testing.assert_close(found[0, :n], alone[0], rtol=1e-4, atol=1e-2)
    assert bool((found[0, n:] == found[0, n - 1]).all()) and bool(torch.isfinite(found).all())


@pytest.mark.parametrize("sizes", [(1, 1), (1, 9), (9, 1), (2, 3), (5, 0), (0, 5), (17, 16)])
@pytest.mark.parametrize("pool", [None, 1, 2, 4, 100])
def test_every_size(sizes: tuple[int, int], pool: int | None) -> None:
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 4, n, 3, generator=g) for n in sizes)
    centers = scout_centers(q, k[:, :2], pool=pool, enable_gqa=True)
    assert centers.shape == (2, sizes[0]) and bool(torch.isfinite(centers).all())
    assert not centers.numel() or (centers.min() >= 0 and centers.max() <= max(0, sizes[1] - 1))


def test_refused() -> None:
    q = torch.randn(2, 3, 8, 4)
    for error, words, options in (
        (ValueError, "pool=0 must be 1 or more", {"pool": 0}),
        (TypeError, "pool must be an integer", {"pool": 2.5}),
        (TypeError, "query must be a tensor, got list", {"query": [1.0]}),
        (ValueError, "query_lengths holds 9", {"query_lengths": torch.tensor([9, 1])}),
        (ValueError, "epsilon=-1.0 must be positive", {"epsilon": -1.0}),
    ):
        with pytest.raises(error, match=words):
            scout_centers(**{"query": q, "key": q} | options)
    with pytest.raises(ValueError, match="scout_centers looks at data"):
        scout_centers(q.to("meta"), q.to("meta"))
