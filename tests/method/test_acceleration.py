"""Acceleration of the stopped base: its formula, what it buys, and that it combines with everything else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conformance import ENGINES
from marks import slow_after
from torch import Tensor, nn

from torch_sinkhorn_attn import (
    Dustbin,
    SinkhornMultiheadAttention,
    certify,
    replace_attention,
    sinkhorn_attention,
    sinkhorn_plan,
)
from torch_sinkhorn_attn.engines.tiled.engine import ENGINE as tiled
from torch_sinkhorn_attn.method import acceleration
from torch_sinkhorn_attn.problem.arguments import prepare
from torch_sinkhorn_attn.problem.segments import Components
from torch_sinkhorn_attn.problem.status import SinkhornAux

D = torch.float64
FAST: dict[str, Any] = {"acceleration": "chebyshev"}
engines = pytest.mark.parametrize("engine", [*ENGINES, "reference"])


def tensors(*shape: int, seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    """Query, key and value `(..., n, E)`."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(shape, generator=g, dtype=D) for _ in range(3))
    return [q * scale, k, v]


def aux_of(q: Tensor, k: Tensor, **options: Any) -> SinkhornAux:
    return sinkhorn_attention(q, k, k, return_aux=True, **options)[1]


# The formula


def by_the_formula(
    scores: Tensor, b: Tensor, rho: float, iters: int, contraction: float | None, v: Tensor
) -> tuple[list[Tensor], float]:
    """v^0, v^1, ..., and lambda, of one problem with row masses 1: written down once more, step by step."""
    found, lam, omega = [v], contraction, 1.0
    plain = 3 if contraction is None else 1
    u = torch.zeros(scores.shape[0], dtype=D)
    for t in range(1, iters + 1):
        image = rho * (b.log() - torch.logsumexp(scores + u[:, None], 0))
        if t <= plain:
            v = image
        else:
            assert lam is not None
            g, mu, k = 2 / (2 - lam), lam / (2 - lam), t - plain
            omega = 1.0 if k == 1 else 1 / (1 - mu**2 / 2) if k == 2 else 1 / (1 - omega * mu**2 / 4)
            old = v if k == 1 else found[-2]
            v = omega * (v + g * (image - v) - old) + old
        found.append(v)
        if t == 3 and contraction is None:
            norms = [float((b * (found[i] - found[i - 1]) ** 2).sum()) ** 0.5 for i in (2, 3)]
            ratio = min(1.0, norms[1] / norms[0]) if norms[0] else 0.0
            lam = min(1 - (1 - ratio) / 4, 0.9)
        u = rho * -torch.logsumexp(scores + v[None], 1)
    return found, 0.0 if lam is None else lam


@engines
@pytest.mark.parametrize("contraction", [None, 0.5, 0.97])
@pytest.mark.parametrize("tau", slow_after(1, [None, 2.0]))
def test_it_is_its_formula(engine: str, contraction: float | None, tau: float | None) -> None:
    """By a warm start, unequal masses, and relaxation, in every iteration."""
    q, k, _ = tensors(1, 7, 4, scale=2.0)
    k = k[:, :5]
    b = torch.tensor([1.0, 2.0, 0.5, 3.0, 0.5], dtype=D)
    warm = torch.zeros(1, 7, dtype=D), torch.randn(1, 5, generator=torch.Generator().manual_seed(1), dtype=D)
    rho = 1.0 if tau is None else tau / (tau + 1)
    scores = (q @ k.transpose(-1, -2) / 2)[0]
    options = {"col_mass": b, "row_mass": torch.ones(7, dtype=D), "relaxation": tau, "initial_potentials": warm}
    options |= {**FAST, "contraction": contraction, "tail_iters": 0, "engine": engine}
    for iters in (1, 2, 3, 4, 5, 6, 9):
        truth = by_the_formula(scores, b, rho, iters, contraction, warm[1][0])[0][-1]
        found = aux_of(q, k, base_iters=iters, **options).col_potential[0]
        gauge = (found - truth).mean() if tau is None else 0.0  # the engine centres u
        assert torch.allclose(found - gauge, truth, atol=1e-12)


@engines
def test_the_first_iterations_are_plain(engine: str) -> None:
    q, k, v = tensors(2, 9, 4, scale=2.0)
    for contraction, last in ((None, 3), (0.9, 1)):
        for iters in (0, last, last + 1):
            plain, fast = (
                sinkhorn_attention(q, k, v, base_iters=iters, engine=engine, **options)
                for options in ({}, {**FAST, "contraction": contraction})
            )
            assert torch.equal(plain, fast) == (iters <= last)


def test_the_estimate() -> None:
    """Of one problem in two segments; a problem that does not move, one that grows, and columns without mass."""
    own = Components(None, torch.tensor([0, 0, 0, 1, 1, 2, 3]), 4)
    log_b = torch.tensor([1.0, 4.0, 0.0, 1.0, 1.0, 1.0, 2.0], dtype=D).log()
    first = torch.tensor([2.0, -1.0, 99.0, 0.0, 0.0, 1.0, 1e200], dtype=D)
    second = torch.tensor([0.0, -0.5, -99.0, 1.0, 0.0, 3.0, 1e199], dtype=D)
    norms = [acceleration.log_norm(x, log_b, own) for x in (second, first)]
    assert torch.allclose(norms[1].exp()[:3], torch.tensor([8.0, 0.0, 1.0], dtype=D).sqrt())
    found = acceleration.estimate(*norms)
    expected = [1 - (1 - 1 / 8**0.5) / 4, 0.75, 0.9, 1 - 0.9 / 4]  # r = sqrt(1 / 8), 0, more than 1, and 0.1
    assert torch.allclose(found, torch.tensor(expected, dtype=D))


@engines
def test_a_fixed_point_stays(engine: str) -> None:
    """Where nothing moves any more no ratio is taken; a column without support stays at 0 from any warm start."""
    q, k, v = torch.zeros(3, 1, 4, 2, dtype=D)
    assert torch.equal(*(sinkhorn_attention(q, k, v, engine=engine, **options) for options in ({}, FAST)))
    q, k = torch.zeros(1, 2, 3, dtype=D), torch.zeros(1, 8, 3, dtype=D)
    warm = torch.ones(1, 2, dtype=D), torch.ones(1, 8, dtype=D)
    options = {"window": (0, 0), "relaxation": 1.0, "tail_iters": 0, "initial_potentials": warm, "engine": engine}
    dead = sinkhorn_plan(q, k, **options).sum(-2)[0] == 0
    for contraction in (None, 0.9):
        found = aux_of(q, k, base_iters=6, **FAST, contraction=contraction, **options).col_potential
        assert dead.any() and (found[0, dead] == 0).all() and found.isfinite().all()


# What it buys


def column_errors(q: Tensor, k: Tensor, **options: Any) -> Tensor:
    """Largest and mean |column sum / b - 1| of the plan, `(2, ...)`: what the next half-step would put right."""
    after = [aux_of(q, k, **options, tail_iters=tail).col_potential for tail in (2, 3)]
    error = (after[0] - after[1]).expm1().abs()
    return torch.stack([error.amax(-1), error.mean(-1)])


@pytest.mark.slow
def test_it_is_hardly_ever_worse_than_plain() -> None:
    """Random problems, easy and hard, at the same number of iterations. From 8 on it is never above 1.5 times the plain
    error unless that is small by then; 5, of which it accelerates two, are too few."""
    ratios = {5: torch.zeros(0, dtype=D), 8: torch.zeros(0, dtype=D)}
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        n = int(torch.randint(8, 65, (1,), generator=g))
        epsilon = float(torch.empty(1, dtype=D).uniform_(math.log(0.03), math.log(2), generator=g).exp())
        window = None if seed % 2 else (int(torch.randint(2, 9, (1,), generator=g)),) * 2
        q, k = (torch.randn(2, n, 16, generator=g, dtype=D) for _ in range(2))
        options = {"epsilon": epsilon, "window": window, "engine": "reference"}
        for iters in (5, 8, 10, 15, 20):
            plain, fast = (column_errors(q, k, base_iters=iters, **options, **more) for more in ({}, FAST))
            ratios[min(iters, 8)] = torch.cat([ratios[min(iters, 8)], (fast / plain)[fast > 3e-4]])
    assert ratios[5].max() < 3 and ratios[8].max() <= 1.5
    assert min(len(x) for x in ratios.values()) > 50 and ratios[8].median() < 0.5


def band(kind: str, length: int) -> tuple[Tensor, Tensor]:
    """Tokens of 64 features: random, queries like their keys, and keys whose popularity varies slowly."""
    g = torch.Generator().manual_seed(0)
    k, other = (torch.randn(1, length, 64, generator=g, dtype=D) for _ in range(2))
    if kind == "alike":
        return 0.7 * k + 0.7 * other, k
    if kind == "slow":
        k = k * 0.5
        k[..., 0] += 2 * torch.sin(2 * math.pi * 4 * torch.arange(length, dtype=D) / length)
        other[..., 0] += 2
    return other, k


@pytest.mark.parametrize("epsilon", slow_after(1, [1.0, 0.25]))
@pytest.mark.parametrize("kind", ["random", "alike", "slow"])
def test_ten_iterations_balance_a_band_as_twenty_plain_ones(kind: str, epsilon: float) -> None:
    q, k = band(kind, 1024)
    options = {"epsilon": epsilon, "window": (128, 128)}
    fast = column_errors(q, k, base_iters=10, **options, **FAST)
    twenty, ten = (column_errors(q, k, base_iters=iters, **options) for iters in (20, 10))
    assert (fast[1] <= 1.1 * twenty[1]).all() and (fast[1] < 0.8 * ten[1]).all()


def test_a_known_contraction_balances_sooner() -> None:
    q, k, _ = tensors(2, 96, 16)
    options = {"window": (6, 6), "base_iters": 80}
    rate = float(certify(q, k, window=(6, 6), base_iters=2000).rate.max())
    plain = aux_of(q, k, **options).col_residual
    assert (aux_of(q, k, **options, **FAST).col_residual < plain / 2).all()
    assert (aux_of(q, k, **options, **FAST, contraction=rate).col_residual < plain / 100).all()


# Together with the rest


SOME: dict[str, dict[str, Any]] = {
    "plain": {},
    "band": {"window": (3, 3)},
    "dustbin": {"dustbin": Dustbin(0.5, 0.1)},
    "relaxed": {"relaxation": (1.0, 3.0)},
    "given": {"contraction": 0.8},
    "implicit": {"gradient": "implicit"},
    "no tail": {"tail_iters": 0},
}


@engines
@pytest.mark.parametrize("name", slow_after(2, SOME))
def test_early_stopping_equals_fewer_iterations(engine: str, name: str) -> None:
    """It is the plain half-step that is judged."""
    q, k, v = tensors(1, 12, 4, scale=1.5)
    options = {"engine": engine, **FAST, **SOME[name]}
    for tolerance in (1e-1, 1e-3):
        for t in range(1, 40):
            stopped = aux_of(q, k, **{**options, "base_iters": t, "tail_iters": 0}).col_potential
            plain = aux_of(q, k, **{**options, "base_iters": t, "tail_iters": 1}).col_potential
            if (plain - stopped).abs().max() <= tolerance:
                break
        assert 1 < t < 39
        found = sinkhorn_attention(q, k, v, base_iters=60, tolerance=tolerance, **options)
        assert torch.allclose(found, sinkhorn_attention(q, k, v, base_iters=t, **options), atol=1e-12, rtol=0)
        assert not torch.allclose(found, sinkhorn_attention(q, k, v, base_iters=t - 1, **options), atol=1e-9, rtol=0)


@engines
@pytest.mark.parametrize("dustbin", [None, Dustbin(0.5, -0.5)], ids=["no dustbin", "dustbin"])
@pytest.mark.parametrize("tolerance", slow_after(1, [None, 1e-2]))
def test_packed_equals_separate(engine: str, dustbin: Dustbin | None, tolerance: float | None) -> None:
    """Each segment has a contraction of its own."""
    q, k, v = tensors(2, 15, 4, seed=3)
    ids = torch.tensor([-1, 0, 0, 0, 0, -1, 1, 1, 1, 1, 1, 2, 2, 2, -1])
    q = q * torch.tensor([0.1, 2.0, 3.0, 0.5], dtype=D)[ids.clamp(min=0), None]
    options = {"base_iters": 6, "tail_iters": 1, "tolerance": tolerance, "dustbin": dustbin, "engine": engine, **FAST}
    packed = sinkhorn_attention(q, k, v, query_segment_ids=ids, key_segment_ids=ids, **options)
    for g in range(3):
        own = [x[:, ids == g] for x in (q, k, v)]
        assert torch.allclose(packed[:, ids == g], sinkhorn_attention(*own, **options), atol=1e-12)


@engines
def test_every_head_has_its_own_contraction(engine: str) -> None:
    q, k, v = tensors(2, 3, 12, 4)
    q = q * torch.tensor([[0.3, 1.0, 2.5], [4.0, 0.1, 1.5]], dtype=D)[..., None, None]
    options = {"base_iters": 6, "tail_iters": 1, "engine": engine, **FAST}
    together = sinkhorn_attention(q, k, v, **options)
    for i, h in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        alone = sinkhorn_attention(q[i, h, None], k[i, h, None], v[i, h, None], **options)
        assert torch.allclose(together[i, h, None], alone, atol=1e-12)


@engines
@pytest.mark.parametrize("scale", [1.0, 70.0, 3e4, 1e15])
def test_float32(engine: str, scale: float) -> None:
    """As near to float64 as plain iterations are, and finite however large the scores, whose squares overflow."""
    q, k, v = tensors(2, 40, 8, scale=scale)
    single = [x.float() for x in (q, k, v)]
    for more in ({}, {"window": (4, 4)}, {"contraction": 0.95}):
        found = sinkhorn_attention(*single, engine=engine, **FAST, **more)
        assert found.isfinite().all()
        if scale == 1:
            assert (found - sinkhorn_attention(q, k, v, engine="reference", **FAST, **more)).abs().max() < 2e-5


@engines
@pytest.mark.parametrize("options", slow_after(1, [{}, {"tolerance": 0.1, "tail_iters": 1}, {"contraction": 0.7}]))
def test_gradients_are_exact_for_the_surrogate(engine: str, options: dict[str, Any]) -> None:
    """The surrogate is the tail from constant duals: those of this base, whatever they are."""
    options = {**options, **FAST, "base_iters": 6}
    q, k, v = (x.requires_grad_() for x in tensors(2, 6, 3))
    prepared = prepare(q.detach(), k.detach(), v.detach(), **options)
    duals = tiled.solve(prepared.inputs, prepared.problem)
    start = (duals.row[0, 0], duals.col[0, 0])
    tail = options.get("tail_iters", 2)
    out = sinkhorn_attention(q, k, v, engine=engine, **options)
    truth = sinkhorn_attention(q, k, v, base_iters=0, tail_iters=tail, initial_potentials=start, engine="reference")
    assert torch.allclose(out, truth, atol=1e-12)
    for x, y in zip(*(torch.autograd.grad(o.sin().sum(), (q, k, v)) for o in (out, truth)), strict=True):
        assert torch.allclose(x, y, atol=1e-12)


@pytest.mark.slow
def test_second_derivatives_take_the_same_base() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(1, 5, 3))
    found = []
    for engine in ("tiled", "reference"):
        out = sinkhorn_attention(q, k, v, base_iters=5, engine=engine, **FAST)
        (first,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), k)[0])
    assert torch.allclose(*found, atol=1e-12)


@engines
def test_the_implicit_gradient_is_that_of_the_fixed_point(engine: str) -> None:
    q, k, v = (x.requires_grad_() for x in tensors(1, 6, 3))
    options = {"gradient": "implicit", "base_iters": 200, "engine": engine}
    found = [torch.autograd.grad(sinkhorn_attention(q, k, v, **options, **o).sin().sum(), q)[0] for o in ({}, FAST)]
    assert torch.allclose(*found, atol=1e-9)


@pytest.mark.slow
@engines
@pytest.mark.parametrize("packed", slow_after(0, [False, True], {True}))
def test_compiled_and_vmapped_equal_eager(engine: str, packed: bool) -> None:
    q, k, v = tensors(3, 2, 10, 4, scale=2.0)
    ids = torch.tensor([0] * 4 + [1] * 6)
    options = {"tolerance": 1e-2, "base_iters": 6, "tail_iters": 1, "engine": engine, **FAST}
    options |= {"query_segment_ids": ids, "key_segment_ids": ids} if packed else {}

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sinkhorn_attention(q, k, v, **options)

    eager = function(q, k, v)
    assert not torch.allclose(eager, sinkhorn_attention(q, k, v, **(options | {"acceleration": None})), atol=1e-6)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(q, k, v), eager, atol=1e-12)
    assert torch.allclose(torch.vmap(function)(q, k, v), eager, atol=1e-12)


def test_certificates() -> None:
    """kappa bounds plain half-steps alone; the bound against the implicit gradient holds for any base."""
    q, k, _ = tensors(2, 6, 4, scale=0.5)
    plain, fast = certify(q, k), certify(q, k, **FAST)
    assert plain.bias_bound.isfinite().all() and fast.bias_bound.isinf().all()
    assert (fast.measured_bias <= fast.implicit_bias_bound).all() and fast.implicit_bias_bound.isfinite().all()
    for iters, contraction in ((3, None), (1, 0.9), (0, None)):  # no iteration is accelerated
        found = certify(q, k, base_iters=iters, contraction=contraction, **FAST)
        assert torch.equal(found.bias_bound, certify(q, k, base_iters=iters).bias_bound)
    assert certify(q, k, base_iters=2, contraction=0.9, **FAST).bias_bound.isinf().all()


# Doors


def test_the_module_and_the_swap_take_it() -> None:
    chosen = {**FAST, "contraction": 0.9, "base_iters": 5}
    module = SinkhornMultiheadAttention(8, 2, batch_first=True, dtype=D, **chosen)
    assert "acceleration='chebyshev', contraction=0.9" in repr(module)
    x = 8 * torch.randn(2, 9, 8, dtype=D)
    weights = module(x, x, x, average_attn_weights=False)[1]
    projected = nn.functional.linear(x, module.in_proj_weight).chunk(3, -1)
    q, k, _ = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in projected)
    assert torch.allclose(weights, sinkhorn_plan(q, k, **chosen), atol=1e-12)
    for name in ("acceleration", "contraction"):  # both matter here
        other = {x: y for x, y in chosen.items() if x not in (name, "contraction")}
        assert not torch.allclose(weights, sinkhorn_plan(q, k, **other), atol=1e-6)
    swapped = nn.MultiheadAttention(8, 2)
    replace_attention(swapped, **chosen)
    assert (swapped.acceleration, swapped.contraction) == ("chebyshev", 0.9)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "acceleration='anderson' is unknown; choose 'chebyshev', or None", {"acceleration": "anderson"}),
        (ValueError, "acceleration=True is unknown", {"acceleration": True}),
        (ValueError, "contraction=0.0 must lie between 0 and 1, both excl", {**FAST, "contraction": 0}),
        (ValueError, "contraction=1.0 must lie", {**FAST, "contraction": 1}),
        (ValueError, "contraction=nan must be finite", {**FAST, "contraction": math.nan}),
        (TypeError, "contraction must be a number, got '0.5'", {**FAST, "contraction": "0.5"}),
        (TypeError, "contraction must be a Python number", {**FAST, "contraction": torch.tensor(0.5)}),
        (ValueError, "contraction=0.5 is read by acceleration alone.*pass acceleration=", {"contraction": 0.5}),
        (ValueError, "acceleration='chebyshev' and over_relaxation=1.5.*leave", {**FAST, "over_relaxation": 1.5}),
        (ValueError, "acceleration='chebyshev' needs a stopped base.*=None", {**FAST, "gradient": "unrolled"}),
    ],
)
def test_bad_options_are_refused_everywhere(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    q, k, v = tensors(1, 4, 3)
    calls = [
        lambda: sinkhorn_attention(q, k, v, **options),
        lambda: sinkhorn_plan(q, k, **options),
        lambda: certify(q, k, **options),
        lambda: SinkhornMultiheadAttention(4, 2, **options),
        lambda: replace_attention(nn.MultiheadAttention(4, 2), **options),
    ]
    for call in calls:
        with pytest.raises(error, match=message):
            call()
