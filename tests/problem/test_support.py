"""Intervals against the window's definition by exact fractions, their transpose, packing and components."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from torch_sinkhorn_attn.problem.arguments import prepare
from torch_sinkhorn_attn.problem.masks.scan import scan_mask
from torch_sinkhorn_attn.problem.segments import by_segment, components, segment_sum
from torch_sinkhorn_attn.problem.support import build_support, token_ids, transpose_intervals


def brute_window(n: int, m: int, left: int, right: int) -> Tensor:
    """Key j is in row i's window iff -left <= j - c_i <= right, c_i = (i + 1/2) m/n - 1/2."""
    rows = []
    for i in range(n):
        c = (i + Fraction(1, 2)) * Fraction(m, n) - Fraction(1, 2)
        rows.append([(left < 0 or j - c >= -left) and (right < 0 or j - c <= right) for j in range(m)])
    return torch.tensor(rows)


def as_mask(lo: Tensor, hi: Tensor, size: int) -> Tensor:
    column = torch.arange(size)
    return (column >= lo[..., None]) & (column < hi[..., None])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("m", [1, 2, 4, 5, 9, 13])
def test_window_is_its_definition(n: int, m: int) -> None:
    ids = token_ids(1, n, None, None, torch.device("cpu")), token_ids(1, m, None, None, torch.device("cpu"))
    for left in (-1, 0, 1, 2, 20):
        for right in (-1, 0, 1, 3):
            s = build_support(*ids, (left, right), packed=False)
            expected = brute_window(n, m, left, right)
            assert torch.equal(as_mask(s.row_lo[0], s.row_hi[0], m), expected), (left, right)
            live = expected.any(-1)
            assert (s.row_lo[0][live].diff() >= 0).all() and (s.row_hi[0][live].diff() >= 0).all()


@pytest.mark.parametrize("seed", range(40))
def test_packed_support_is_the_window_of_each_segment(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    sizes = int(torch.randint(1, 14, (1,), generator=g)), int(torch.randint(1, 14, (1,), generator=g))
    ids = []
    for n in sizes:
        x = torch.randint(0, 4, (2, n), generator=g).sort(-1).values
        ids.append(torch.where(torch.rand(2, n, generator=g) < 0.2, -1, x))
    window = tuple(int(x) for x in torch.randint(-1, 3, (2,), generator=g))
    s = build_support(ids[0], ids[1], window, packed=True)
    for batch in range(2):
        expected = torch.zeros(sizes, dtype=torch.bool)
        common = sorted(set(ids[0][batch].tolist()) & set(ids[1][batch].tolist()) - {-1})
        active = [torch.zeros(n, dtype=torch.bool) for n in sizes]
        for index, segment in enumerate(common):
            r, c = (ids[side][batch] == segment for side in (0, 1))
            where = r.nonzero()[:, 0], c.nonzero()[:, 0]
            expected[where[0][:, None], where[1]] = brute_window(len(where[0]), len(where[1]), *window)
            active[0] |= r
            active[1] |= c
            assert (s.row_segment[batch][r] == index).all() and (s.col_segment[batch][c] == index).all()
        assert torch.equal(s.row_active[batch], active[0]) and torch.equal(s.col_active[batch], active[1])
        found = as_mask(s.row_lo[batch], s.row_hi[batch], sizes[1]) & active[1] & active[0][:, None]
        assert torch.equal(found, expected), window


@pytest.mark.parametrize("seed", range(20))
def test_transpose_covers_exactly_the_rows_of_each_column(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    n, m = int(torch.randint(1, 12, (1,), generator=g)), int(torch.randint(1, 12, (1,), generator=g))
    lo = torch.randint(0, m, (3, n), generator=g).sort(-1).values
    hi = torch.maximum(torch.randint(0, m + 1, (3, n), generator=g).sort(-1).values, lo)
    empty = (lo >= hi) | (torch.rand(3, n, generator=g) < 0.2)
    lo, hi = torch.where(empty, 0, lo), torch.where(empty, 0, hi)
    mask = as_mask(lo, hi, m)
    col_lo, col_hi = transpose_intervals(lo, hi, m)
    for b in range(3):
        for j in range(m):
            rows = mask[b, :, j].nonzero()[:, 0].tolist()
            if rows:
                assert (col_lo[b, j], col_hi[b, j]) == (rows[0], rows[-1] + 1)
            else:
                assert col_lo[b, j] >= col_hi[b, j]


def connected(support: Tensor) -> list[set]:
    """Connected components of a bipartite support, by search."""
    seen: set = set()
    parts = []
    for start in range(support.shape[0]):
        if ("r", start) in seen or not support[start].any():
            continue
        stack, part = [("r", start)], set()
        while stack:
            node = stack.pop()
            if node in part:
                continue
            part.add(node)
            line = support[node[1]] if node[0] == "r" else support[:, node[1]]
            stack += [("c" if node[0] == "r" else "r", x) for x in line.nonzero()[:, 0].tolist()]
        seen |= part
        parts.append(part)
    return parts


@pytest.mark.parametrize("seed", range(30))
def test_components_are_the_connected_ones(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    n, m = int(torch.randint(1, 10, (1,), generator=g)), int(torch.randint(1, 10, (1,), generator=g))
    x = torch.randn(1, n, 3), torch.randn(1, m, 3)
    ids = [torch.randint(0, 3, (size,), generator=g).sort().values for size in (n, m)]
    dead = torch.rand(m, generator=g) < 0.2
    window = tuple(int(v) for v in torch.randint(0, 2, (2,), generator=g))
    problem = prepare(
        *x, None, ~dead, query_segment_ids=ids[0], key_segment_ids=ids[1], window=window, relaxation=1.0
    ).problem
    live = (problem.marginals.log_row_mass[0, 0] > -torch.inf), (problem.marginals.log_col_mass[0, 0] > -torch.inf)
    support = as_mask(problem.support.row_lo[0], problem.support.row_hi[0], m) & live[0][:, None] & live[1]
    parts = components(problem)
    labels = []
    for part in connected(support):
        own = {parts.row[0, 0, i].item() for kind, i in part if kind == "r"}
        own |= {parts.col[0, 0, j].item() for kind, j in part if kind == "c"}
        assert len(own) == 1
        labels.append(own.pop())
    assert len(set(labels)) == len(labels) and max(labels, default=0) < parts.number


def test_mask_scan_equals_dense_reductions() -> None:
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        ids = [torch.randint(-1, 2, (2, n), generator=g).sort(-1).values for n in (7, 9)]
        s = build_support(*ids, (4, 2), packed=True)
        shape = [(2, 3, 7, 9), (1, 1, 1, 9), (2, 1, 7, 1), (1, 3, 7, 9)][seed % 4]
        mask = torch.rand(shape, generator=g) < 0.6
        scan = scan_mask(mask, s, packed=True, dtype=torch.float32)
        keep = mask & s.row_active[:, None, :, None] & s.col_active[:, None, None]
        keep = keep & (s.row_segment[:, None, :, None] == s.col_segment[:, None, None])
        inside = keep & as_mask(s.row_lo, s.row_hi, 9)[:, None]
        assert torch.equal(scan.row_active, keep.any(-1)) and torch.equal(scan.col_active, keep.any(-2))
        assert torch.equal(scan.col_covered, inside.any(-2))
        for index in torch.cartesian_prod(*(torch.arange(k) for k in inside.shape[:3])).tolist():
            columns = inside[tuple(index)].nonzero()[:, 0].tolist()
            hull = (columns[0], columns[-1] + 1) if columns else (0, 0)
            assert (scan.row_lo[tuple(index)], scan.row_hi[tuple(index)]) == hull


def test_segment_sums_and_their_inverse() -> None:
    index = torch.tensor([[0, 0, 2, 1]])
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    assert segment_sum(x, index[:, None], 3).tolist() == [[[3.0, 4.0, 3.0]]]
    assert by_segment(torch.tensor([[[5.0, 6.0, 7.0]]]), index[:, None], 4).tolist() == [[[5.0, 5.0, 7.0, 6.0]]]
