"""The warning of a plan that is not balanced: once, where data may be looked at, and not without need."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conformance import ENGINES
from torch import Tensor

from torch_sinkhorn_attn import Dustbin, SinkhornMultiheadAttention, set_checks, sinkhorn_attention, sinkhorn_plan
from torch_sinkhorn_attn.problem import unbalanced
from torch_sinkhorn_attn.problem.unbalanced import UnbalancedPlanWarning

engines = pytest.mark.parametrize("engine", [*ENGINES, "reference"])


@pytest.fixture(autouse=True)
def _not_said(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(unbalanced, "_said", False)
    yield


def normal(*shape: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for _ in range(3)]


def said(*inputs: Tensor, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sinkhorn_attention(*inputs, **options)
    return [str(x.message) for x in caught if x.category is UnbalancedPlanWarning]


@engines
def test_it_says_once_what_to_do(engine: str) -> None:
    inputs = normal(2, 2, 64, 32)
    (text,) = said(*inputs, epsilon=1e-3, engine=engine)
    for words in ("base_iters=20", "tail_iters=2", "off by a factor of", "0.001", "over_relaxation=1.5", "certify"):
        assert words in text
    assert not said(*inputs, epsilon=1e-3, engine=engine)


@engines
def test_of_a_plan_and_of_the_module_at_the_code_that_called(engine: str) -> None:
    q, k, _ = normal(2, 64, 32)
    for log in (False, True):
        unbalanced._said = False
        with pytest.warns(UnbalancedPlanWarning) as caught:
            sinkhorn_plan(q, k, epsilon=1e-3, engine=engine, log=log)
        assert caught[0].filename == __file__
    unbalanced._said = False
    module = SinkhornMultiheadAttention(32, 2, epsilon=1e-4, engine=engine)
    with pytest.warns(UnbalancedPlanWarning) as caught:
        module(100 * q, 100 * q, q)
    assert caught[0].filename == __file__


@engines
@pytest.mark.parametrize("size", [16, 128])
def test_ordinary_calls_are_quiet(engine: str, size: int) -> None:
    for inputs in (normal(2, size, 64), [normal(2, size, 64)[0]] * 3):
        for epsilon in (1.0, 0.25, 0.1):
            assert not said(*inputs, epsilon=epsilon, engine=engine)
        for window in (2, 16):
            assert not said(*inputs, window=(window, window), engine=engine)
            assert not said(*inputs, window=(window, window), epsilon=0.25, engine=engine)
        assert not said(*inputs, dustbin=Dustbin(0.0, 0.0), engine=engine)
        assert not said(*inputs, relaxation=1.0, engine=engine)
        assert not said(*inputs, row_mass=torch.linspace(1e-6, 1, size), engine=engine)


def test_where_it_does_not_look() -> None:
    """Not asked to, too few iterations to expect balance, no tail to tell by, softmax, no tokens, compiled, mapped."""
    inputs = normal(2, 64, 32)
    set_checks("never")
    assert not said(*inputs, epsilon=1e-3)
    set_checks("auto")
    for base, tail in ((0, 0), (20, 0), (2, 2), (0, 1)):
        assert not said(*inputs, epsilon=1e-3, base_iters=base, tail_iters=tail)
    empty = torch.zeros(2, 0, 4)
    assert not said(empty, empty, empty) and not said(*(x[None, :, :][:0] for x in inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnbalancedPlanWarning)
        torch.compile(sinkhorn_attention, backend="eager")(*inputs, epsilon=1e-3)
        torch.func.vmap(lambda *x: sinkhorn_attention(*x, epsilon=1e-3))(*(x[:, None] for x in inputs))


@pytest.mark.parametrize("gradient", ["tail", "implicit", "unrolled"])
def test_it_is_the_column_error_one_iteration_before_the_last(gradient: str) -> None:
    q, k, v = normal(1, 64, 32)
    plan = sinkhorn_plan(q.double(), k.double(), epsilon=1e-3, base_iters=20, tail_iters=1)
    unbalanced._said = False
    (text,) = said(q, k, v, epsilon=1e-3, gradient=gradient)
    worst = plan.sum(-2).log().abs().max().exp()
    assert abs(float(text.split("factor of ")[1].split()[0]) - worst) < 0.02 * worst


def test_relaxed_columns_have_no_error_to_tell() -> None:
    q, k, v = normal(1, 64, 32)
    (text,) = said(20 * q, k, v, epsilon=1e-2, relaxation=(None, 1e3))
    assert "still far from their limit" in text and "factor" not in text
    assert not said(q, k, v, epsilon=0.1, relaxation=(None, 1.0))
