"""Bands of the plan against the dense plan, values and gradients."""

from __future__ import annotations

from typing import Any

import problems
import pytest
import torch
from conformance import ENGINES, relative_error, weights
from marks import slow_after
from torch import Tensor

from torch_sinkhorn_attn import Dustbin, PlanBand, set_checks, sinkhorn_plan, sinkhorn_plan_band
from torch_sinkhorn_attn.engines.tiled import tiles

D = torch.float64
everywhere = pytest.mark.parametrize("engine", [*ENGINES, "reference"])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = D) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def finite(x: Tensor) -> Tensor:
    return x.masked_fill(x == -torch.inf, 0.0)


def parts_of(plan: Tensor | PlanBand, length: int, size: int, log: bool) -> list[Tensor]:
    """The real entries as a matrix, and the dustbin's column and row."""
    if isinstance(plan, PlanBand):
        dense = plan.dense(size, -torch.inf if log else 0.0)
        return [x for x in (dense, plan.row_dustbin, plan.col_dustbin) if x is not None]
    parts = [plan[..., :length, :size]]
    return parts if plan.shape[-1] == size else [*parts, plan[..., :length, size], plan[..., length, :size]]


def agrees(call: problems.Call, engine: str, log: bool) -> None:
    options = {name: x for name, x in call.options.items() if name != "dropout_p"}
    length, size, found = call.query.shape[-2], call.key.shape[-2], []
    for function, name in ((sinkhorn_plan, "reference"), (sinkhorn_plan_band, engine)):
        parts = parts_of(function(call.query, call.key, call.mask, log=log, engine=name, **options), length, size, log)
        loss = sum((finite(x) * weights(x)).sum() for x in parts)
        grads = torch.autograd.grad(loss, call.leaves, allow_unused=True)
        zeros = [torch.zeros_like(x) if g is None else g for x, g in zip(call.leaves, grads, strict=True)]
        found.append((parts, zeros))
    (expected, grads), (values, mine) = found
    for x, y in zip(values, expected, strict=True):
        assert torch.equal(x == -torch.inf, y == -torch.inf) and relative_error(finite(x), finite(y)) < 1e-10, call
    for x, y in zip(mine, grads, strict=True):
        assert relative_error(x, y) < 1e-8, call


def windowed(start: int, stop: int) -> list[problems.Call]:
    """Random problems with a window of two sides that is not refused."""
    found = []
    for seed in range(start, stop):
        call = problems.make(seed, dropout=False)
        window = call.options.get("window")
        if window is not None and min(window) >= 0:
            try:
                sinkhorn_plan(call.query, call.key, call.mask, engine="reference", **call.options)
            except ValueError:  # a drawn window may leave no pair at all
                continue
            found.append(call)
    return found


@everywhere
@pytest.mark.parametrize("log", slow_after(1, [False, True]))
@pytest.mark.parametrize("start", slow_after(1, range(0, 600, 60), range(180, 600)))
def test_random_problems(start: int, log: bool, engine: str) -> None:
    calls = windowed(start, start + 60)
    assert len(calls) > 10
    for call in calls:
        agrees(call, engine, log)


@pytest.mark.slow
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("start", slow_after(1, range(1000, 1200, 60)))
def test_over_many_tiles(start: int, log: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "block_size", lambda heads, reach=None: 4)
    test_random_problems(start, log, "tiled")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("sizes", [(1, 1), (150, 150), (90, 170), (0, 4), (4, 0)])
def test_sizes(sizes: tuple[int, int], engine: str) -> None:
    query, key = randn(2, sizes[0], 4).requires_grad_(), randn(2, sizes[1], 4, seed=1).requires_grad_()
    call = problems.Call(0, query, key, key, options={"window": (9, 8), "base_iters": 3}, leaves=[query, key])
    agrees(call, engine, False)
    band = sinkhorn_plan_band(query, key, window=(9, 8))
    assert band.values.shape == (2, sizes[0], min(sizes[1], 18)) and band.first_column.shape == (sizes[0],)
    assert (band.columns() >= 0).all() and (band.columns() < max(1, sizes[1])).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_float32_under_a_sharp_epsilon(engine: str) -> None:
    """Logarithms keep their digits where the plan has none left, and factors are formed one by one."""
    query, key = randn(1, 60, 8).mul(6).requires_grad_(), randn(1, 60, 8, seed=1).requires_grad_()
    single = [x.detach().float().requires_grad_() for x in (query, key)]
    options: dict[str, Any] = {"window": (5, 5), "epsilon": 0.05, "base_iters": 50, "log": True}
    truth, found = sinkhorn_plan_band(query, key, **options), sinkhorn_plan_band(*single, engine=engine, **options)
    assert found.values.dtype == torch.float32 and (finite(found.values) < -103).any()
    for x, y in (
        (found.values, truth.values),
        *(
            (g.double(), h)
            for g, h in zip(
                torch.autograd.grad((finite(found.values) * weights(found.values)).sum(), single),
                torch.autograd.grad((finite(truth.values) * weights(truth.values)).sum(), (query, key)),
                strict=True,
            )
        ),
    ):
        assert relative_error(finite(x.double()), finite(y)) < 1e-4


@everywhere
def test_half_and_the_callers_unit_of_mass(engine: str) -> None:
    query = randn(2, 20, 8)
    half = query.half()
    assert sinkhorn_plan_band(half, half, window=(3, 3), engine=engine).values.dtype == torch.float16
    assert sinkhorn_plan_band(half, half, window=(3, 3), log=True, engine=engine).values.dtype == torch.float32
    unit = torch.full((20,), 1e-30, dtype=D)
    options: dict[str, Any] = {"row_mass": unit, "col_mass": unit, "dustbin": Dustbin(0.1, 0.2)}
    for log in (False, True):
        plan = sinkhorn_plan(query, query, window=(3, 3), log=log, engine="reference", **options)
        band = sinkhorn_plan_band(query, query, window=(3, 3), log=log, engine=engine, **options)
        for x, y in zip(parts_of(band, 20, 20, log), parts_of(plan, 20, 20, log), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=0.0)


def test_inactive_keys_between_active_ones_widen_the_band_or_show() -> None:
    """A window counts active keys; where it cannot be seen how far they reach, rows that would be cut are NaN."""
    x, ids = randn(1, 12, 4), torch.zeros(12, dtype=torch.int64)
    ids[4:7] = -1
    options: dict[str, Any] = {"window": (1, 1), "query_segment_ids": ids, "key_segment_ids": ids}
    band, plan = sinkhorn_plan_band(x, x, **options), sinkhorn_plan(x, x, **options)
    assert band.values.shape[-1] == 6 and torch.allclose(band.dense(12), plan)
    mapped = torch.func.vmap(
        lambda y, s: sinkhorn_plan_band(y, y, window=(1, 1), query_segment_ids=s, key_segment_ids=s).dense(12)
    )(x[None], ids[None])[0]
    shown = mapped.isnan().any(-1)
    assert shown.tolist() == [[*[False] * 3, True, *[False] * 3, True, *[False] * 4]]  # the two beside the gap
    assert torch.allclose(mapped[~shown], plan[~shown])


@pytest.mark.parametrize("window", [None, (3, -1), (-1, -1)])
def test_a_window_without_sides_is_refused(window: Any) -> None:
    x = randn(1, 4, 2)
    with pytest.raises(ValueError, match=r"sinkhorn_plan_band got window=.*both 0 or more"):
        sinkhorn_plan_band(x, x, window=window, relaxation=1.0)
    with pytest.raises(ValueError, match="sinkhorn_plan_band got dropout_p"):
        sinkhorn_plan_band(x, x, window=(1, 1), dropout_p=0.1)


@pytest.mark.parametrize("engine", ENGINES)
def test_second_derivatives_and_forward_mode_are_refused(engine: str) -> None:
    x = randn(1, 6, 2).requires_grad_()
    band = sinkhorn_plan_band(x, x, window=(1, 1), engine=engine)
    (grad,) = torch.autograd.grad(band.values.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative beyond the first, nor forward mode: take sinkhorn_plan"):
        grad.sum().backward()
    with pytest.raises((RuntimeError, NotImplementedError), match="forward mode"):
        torch.func.jvp(lambda y: sinkhorn_plan_band(y, y, window=(1, 1), engine=engine).values, (x,), (x,))


@pytest.mark.slow
@pytest.mark.parametrize("engine", slow_after(1, ENGINES))
def test_compiled_and_mapped(engine: str) -> None:
    query, key = randn(3, 2, 20, 4), randn(3, 2, 20, 4, seed=1)
    lengths = torch.tensor([20, 13, 4])

    def of(query: Tensor, key: Tensor, lengths: Tensor) -> Tensor:
        options = {"window": (3, 2), "query_lengths": lengths, "key_lengths": lengths, "dustbin": Dustbin(0.0, 0.3)}
        band = sinkhorn_plan_band(query, key, engine=engine, **options)
        assert band.row_dustbin is not None
        return band.dense(20) * band.row_dustbin[..., None]

    set_checks("never")
    leaf = query.clone().requires_grad_()
    expected = of(leaf, key, lengths)
    (gradient,) = torch.autograd.grad((expected * weights(expected)).sum(), leaf)
    compiled = torch.compile(of, backend="aot_eager", fullgraph=True)(leaf, key, lengths)
    assert torch.equal(compiled, expected)
    assert torch.equal(torch.autograd.grad((compiled * weights(compiled)).sum(), leaf)[0], gradient)
    mapped = torch.func.vmap(of)(leaf, key, lengths)
    assert torch.equal(mapped, expected)
    assert torch.equal(torch.autograd.grad((mapped * weights(mapped)).sum(), leaf)[0], gradient)
    scale = weights(expected)
    each = torch.func.vmap(torch.func.grad(lambda q, k, n, w: (of(q, k, n) * w).sum()))(query, key, lengths, scale)
    assert relative_error(each, gradient) < 1e-12


@pytest.mark.parametrize("engine", slow_after(0, ENGINES, set(ENGINES) - {"cpu"}))
def test_opcheck(engine: str) -> None:
    from torch_sinkhorn_attn.boundary import ops
    from torch_sinkhorn_attn.problem.arguments import prepare

    lib = torch.ops.torch_sinkhorn_attn
    for call in windowed(0, 60)[:4]:
        prepared = prepare(call.query.detach(), call.key.detach(), None, call.mask, **call.options)
        flat = ops.flatten(prepared.inputs, prepared.problem, engine)
        flat = [x.detach() if isinstance(x, Tensor) else x for x in flat]
        arguments = ops.with_residuals(flat, prepared.problem.support.row_lo, 2, False)
        torch.library.opcheck(lib.band.default, tuple(arguments))
        values, *bins, row, col = lib.band(*arguments)
        given = [torch.ones_like(x) if x.ndim > 1 else None for x in (values, *bins)]
        torch.library.opcheck(lib.band_backward.default, (*given, True, values, row, col, *arguments))
