"""Half-steps and products by the engines' own verbs, against the dense definition."""

from __future__ import annotations

import problems
import pytest
import torch
from conformance import ENGINES
from marks import slow_after
from torch import Tensor

from torch_sinkhorn_attn.method import reference
from torch_sinkhorn_attn.problem.arguments import Prepared, prepare
from torch_sinkhorn_attn.problem.feasibility.parts import masked_components
from torch_sinkhorn_attn.problem.segments import Components
from torch_sinkhorn_attn.thermometer.passes import Passes

D = torch.float64
engines = pytest.mark.parametrize("engine", [*ENGINES, "reference"])


def prepared(seed: int) -> Prepared:
    call = problems.make(seed, dropout=False)
    return prepare(call.query.detach(), call.key.detach(), None, call.mask, **call.options)


@engines
@pytest.mark.parametrize("seed", slow_after(12, range(60)))
def test_products_and_half_steps_are_those_of_the_dense_plan(engine: str, seed: int) -> None:
    p = prepared(seed)
    passes, dense = Passes(engine, p.inputs, p.problem), reference.dense_problem(p.inputs, p.problem)
    potentials = passes.solve()
    u, v = potentials.row[-1], potentials.col[-1]
    rho_r, rho_c = p.problem.solver.rho_row, p.problem.solver.rho_col
    assert torch.allclose(passes.row(v), reference.half_step(dense.scores, v, dense.log_a, rho_r, dim=-1), atol=1e-9)
    assert torch.allclose(passes.column(u), reference.half_step(dense.scores, u, dense.log_b, rho_c, dim=-2), atol=1e-9)
    x = torch.randn(3, *v.shape, generator=torch.Generator().manual_seed(seed), dtype=D)
    x = x.masked_fill(dense.log_b == -torch.inf, 0.0)
    plan = reference.log_plan_of(dense, u, v).exp().nan_to_num(0.0)
    assert torch.allclose(passes.times(v, x), torch.einsum("nhij,knhj->knhi", plan, x), rtol=1e-9, atol=1e-11)


@engines
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_lower_precision_are_of_the_compute_dtype(engine: str, dtype: torch.dtype) -> None:
    """Vectors are not rounded to the dtype of query and key; query heads share keys."""
    q, k = (torch.randn(2, h, n, 8, generator=torch.Generator().manual_seed(h)).to(dtype) for h, n in ((4, 9), (2, 7)))
    p = prepare(q, k, None, enable_gqa=True)
    passes = Passes(engine, p.inputs, p.problem)
    v = passes.solve().col[-1]
    x = torch.randn(5, *v.shape, generator=torch.Generator().manual_seed(0))
    found, dense = passes.times(v, x), reference.dense_problem(p.inputs, p.problem)
    plan = reference.log_plan_of(dense, passes.row(v), v).exp()
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.einsum("nhij,knhj->knhi", plan, x), rtol=1e-4, atol=1e-5)


@engines
@pytest.mark.parametrize("seed", slow_after(8, range(40)))
def test_one_head_alone_is_that_head(engine: str, seed: int) -> None:
    p = prepared(seed)
    passes = Passes(engine, p.inputs, p.problem)
    every = passes.solve()
    for n in range(p.problem.sizes[0]):
        for h in range(p.problem.sizes[1]):
            one = passes.at(n, h).solve()
            for found, whole in zip(one, every, strict=True):
                assert torch.allclose(found[:, 0, 0], whole[:, n, h], rtol=1e-9, atol=1e-10)


def by_hand(support: Tensor) -> tuple[list[int], list[int]]:
    """Labels of rows and columns, by the powers of the graph."""
    n, m = support.shape
    graph = torch.eye(n + m)
    graph[:n, n:], graph[n:, :n] = support, support.T
    for _ in range(n + m):
        graph = ((graph @ graph) > 0).float()
    first = graph.int().argmax(-1)
    return first[:n].tolist(), first[n:].tolist()


@pytest.mark.parametrize("window", [None, (2, 2)])
@pytest.mark.parametrize("seed", range(12))
def test_components_of_a_mask(seed: int, window: tuple[int, int] | None) -> None:
    """Two batch elements, a mask of each head or of all, in and outside of windows, float or bool."""
    g = torch.Generator().manual_seed(seed)
    keep = torch.rand(2, 2 if seed % 2 else 1, 9, 9, generator=g) < 0.25
    mask = keep if seed % 3 else torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)
    q, k = (torch.randn(2, 2, 9, 4, generator=g) for _ in range(2))
    p = prepare(q, k, None, mask, window=window, relaxation=1.0)
    found = masked_components(p.inputs, p.problem)
    assert isinstance(found, Components) and found.row is not None and found.col is not None
    support = reference.dense_problem(p.inputs, p.problem).scores > -torch.inf
    for n in range(2):
        for h in range(2):
            rows, cols = by_hand(support[n, h].float())
            live = support[n, h].any(-1).tolist(), support[n, h].any(-2).tolist()
            assert [x for x, y in zip(found.row[n, h].tolist(), live[0], strict=True) if y] == [
                x for x, y in zip(rows, live[0], strict=True) if y
            ]
            assert [x for x, y in zip(found.col[n, h].tolist(), live[1], strict=True) if y] == [
                x for x, y in zip(cols, live[1], strict=True) if y
            ]
