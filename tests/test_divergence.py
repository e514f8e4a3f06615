"""Squared distances as products, and the Sinkhorn divergence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance import ENGINES, relative_error
from test_cost import dense
from torch import Tensor

from torch_sinkhorn_attn import sinkhorn_attention, sinkhorn_divergence, sinkhorn_plan, squared_distance_features

D = torch.float64


def squared(x: Tensor, y: Tensor) -> Tensor:
    return (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("width", [1, 2, 3, 17])
def test_features_give_squared_distances(width: int, engine: str) -> None:
    x, y = (torch.randn(2, 3, n, width, dtype=D, requires_grad=True) for n in (6, 8))
    for scale in (1.0, 0.5):
        plan = sinkhorn_plan(*squared_distance_features(x, y, scale=scale), epsilon=0.4, engine=engine)
        truth = sinkhorn_plan(-scale * squared(x, y), epsilon=0.4, engine=engine)
        assert relative_error(plan, truth) < 1e-11
        grads, expected = (torch.autograd.grad(p.square().sum(), (x, y)) for p in (plan, truth))
        for one, other in zip(grads, expected, strict=True):
            assert relative_error(one, other) < 1e-10


def test_features_far_from_the_origin_and_of_short_floats() -> None:
    x, y = torch.randn(1, 50, 3) + 1e3, torch.randn(1, 40, 3) + 1e3
    truth = sinkhorn_plan(-squared(x.double(), y.double()))
    assert relative_error(sinkhorn_plan(*squared_distance_features(x, y)).double(), truth) < 1e-3
    for kind in (torch.float16, torch.bfloat16):
        query, key = squared_distance_features(x.to(kind), y.to(kind))
        assert query.dtype == key.dtype == torch.float32
    value = torch.randn(1, 40, 2)
    assert sinkhorn_attention(*squared_distance_features(x, y), value, window=(9, 9)).shape == (1, 50, 2)


def reference(x: Tensor, y: Tensor, a: Tensor, b: Tensor, tau: float | None, epsilon: float) -> Tensor:
    def dual(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return dense(-squared(x, y), a, b, (tau, tau), 600, 2, epsilon).held

    bias = 0.0 if tau is None else epsilon / 2 * (a.sum(-1) - b.sum(-1)) ** 2
    return dual(x, y, a, b) - (dual(x, x, a, a) + dual(y, y, b, b)) / 2 + bias


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tau", [None, 0.8])
def test_divergence(tau: float | None, engine: str) -> None:
    x, y = (torch.randn(3, n, 2, dtype=D, requires_grad=True) for n in (7, 5))
    a, b = torch.full((3, 7), 1 / 7, dtype=D), torch.full((3, 5), 1 / 5, dtype=D)
    if tau is not None:
        a, b = a * torch.rand(3, 7, dtype=D), b * 2
    given: dict[str, Any] = {} if tau is None else {"x_mass": a, "y_mass": b}
    found = sinkhorn_divergence(
        x, y, epsilon=2.0, relaxation=tau, base_iters=600, tolerance=1e-13, engine=engine, **given
    )
    truth = reference(x, y, a, b, tau, 2.0)
    assert found.shape == (3,) and relative_error(found, truth) < 1e-9
    grads, expected = (torch.autograd.grad(z.sum(), (x, y)) for z in (found, truth))
    for one, other in zip(grads, expected, strict=True):
        assert relative_error(one, other) < 1e-8


def test_zero_for_equal_sets_positive_else_and_padding_is_nothing() -> None:
    x, y = torch.randn(4, 9, 2, dtype=D), torch.randn(4, 7, 2, dtype=D)
    assert sinkhorn_divergence(x, x).abs().max() < 1e-12
    assert (sinkhorn_divergence(x, y) > 0).all()
    lengths = torch.tensor([9, 4, 1, 6])
    found = sinkhorn_divergence(x, y, x_lengths=lengths, y_lengths=lengths.clamp(max=7))
    for i, n in enumerate(lengths.tolist()):
        assert relative_error(found[i], sinkhorn_divergence(x[i, :n], y[i, : min(n, 7)])) < 1e-6
    assert sinkhorn_divergence(x[0], y[0]).shape == () and sinkhorn_divergence(x[:0], y[:0]).shape == (0,)


@pytest.mark.parametrize("value", [0.0, 1e3, 1e6, 1e30, torch.inf, torch.nan])
def test_what_padding_holds_is_nobodys(value: float) -> None:
    x, y = torch.randn(2, 6, 2), torch.randn(2, 5, 2)
    lengths = torch.tensor([4, 0])
    found = []
    for fill in (1.0, value):
        padded = x.clone()
        padded[0, 4:], padded[1] = fill, fill
        leaf = padded.requires_grad_()
        total = sinkhorn_divergence(leaf, y, x_lengths=lengths, relaxation=1.0)
        found.append((total, torch.autograd.grad(total.sum(), leaf)[0]))
    assert torch.allclose(found[1][0], found[0][0], rtol=1e-5)
    assert torch.allclose(found[1][1][0, :4], found[0][1][0, :4], atol=1e-5)
    assert (found[1][1][0, 4:] == 0).all() and (found[1][1][1] == 0).all()


def test_autocast_rounds_nothing() -> None:
    x = 30 * torch.randn(20, 3)
    truth = sinkhorn_divergence(x, x + 0.1, epsilon=10.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sinkhorn_divergence(x, x + 0.1, epsilon=10.0), truth)


@pytest.mark.parametrize(
    ("x", "y", "options", "words"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 4), {}, "agree"),
        (torch.zeros(3, 2), torch.zeros(3, 2, dtype=D), {}, "dtype"),
        (torch.zeros(3), torch.zeros(3, 2), {}, "x has shape"),
        (torch.zeros(3, 2), [1.0], {}, "y must be a tensor"),
        (torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.int32), {}, "y has dtype"),
        (torch.zeros(3, 2), torch.zeros(3, 2), {"x_mass": torch.ones(4)}, "x_mass"),
        (torch.zeros(3, 2), torch.zeros(3, 2), {"y_lengths": torch.ones(1)}, "y_lengths"),
        (torch.zeros(3, 2), torch.zeros(3, 2), {"epsilon": 0.0}, "epsilon"),
        (torch.zeros(3, 2), torch.zeros(3, 2), {"scale": "a"}, "scale"),
        (torch.zeros(3, 2), torch.zeros(3, 2), {"scale": -1.0}, "scale"),
        (torch.zeros(3, 2), torch.zeros(3, 2), {"relaxation": (1.0, None)}, "relaxation"),
    ],
)
def test_what_is_wrong_is_named(x: Any, y: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        sinkhorn_divergence(x, y, **options)
