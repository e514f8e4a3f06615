"""The options of the stopped base: its tolerance and its over-relaxation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance import ENGINES
from marks import slow_after
from torch import Tensor, nn

from torch_sinkhorn_attn import (
    Dustbin,
    SinkhornMultiheadAttention,
    certify,
    register_transformers,
    replace_attention,
    sinkhorn_attention,
    sinkhorn_plan,
)
from torch_sinkhorn_attn.engines.tiled import tiles
from torch_sinkhorn_attn.engines.tiled.engine import ENGINE as tiled
from torch_sinkhorn_attn.method import reference
from torch_sinkhorn_attn.problem.arguments import prepare
from torch_sinkhorn_attn.problem.status import SinkhornAux

D = torch.float64
engines = pytest.mark.parametrize("engine", [*ENGINES, "reference"])


def tensors(*shape: int, seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    """Query, key and value `(..., n, E)`."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(shape, generator=g, dtype=D) for _ in range(3))
    return [q * scale, k, v]


def aux_of(q: Tensor, k: Tensor, **options: Any) -> SinkhornAux:
    return sinkhorn_attention(q, k, k, return_aux=True, **options)[1]


def changes(q: Tensor, k: Tensor, iters: int, **options: Any) -> Tensor:
    """|v_plain - v^t| after `iters` iterations: the first column half-step of the tail is the one that would come."""
    stopped = aux_of(q, k, base_iters=iters, tail_iters=0, **options).col_potential
    return (aux_of(q, k, base_iters=iters, tail_iters=1, **options).col_potential - stopped).abs()


def stopping_times(q: Tensor, k: Tensor, tolerance: float, most: int = 60, **options: Any) -> Tensor:
    """The iterations `(..., H)` after which each head is done."""
    times = torch.full(q.shape[:-2], most)
    for t in range(most - 1, 0, -1):
        times[changes(q, k, t, **options).amax(-1) <= tolerance] = t
    return times


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "band": {"window": (3, 3)},
    "dustbin": {"dustbin": Dustbin(0.5, 0.1)},
    "relaxed": {"relaxation": (1.0, 3.0)},
    "over-relaxed": {"over_relaxation": 1.3},
    "implicit": {"gradient": "implicit"},
    "no tail": {"tail_iters": 0},
}


# Over-relaxation


@engines
@pytest.mark.parametrize("omega", [1.6, 0.5])
@pytest.mark.parametrize("tau", [None, 2.0])
def test_over_relaxation_is_its_formula(engine: str, omega: float, tau: float | None) -> None:
    q, k, _ = tensors(2, 5, 4)
    g = torch.Generator().manual_seed(1)
    u, v = (torch.randn(2, 5, generator=g, dtype=D) for _ in range(2))
    options = {"relaxation": tau, "initial_potentials": (u, v), "over_relaxation": omega, "engine": engine}
    found = aux_of(q, k, base_iters=4, tail_iters=1, **options)
    scores, rho = q @ k.transpose(-1, -2) / 2, 1.0 if tau is None else tau / (tau + 1)
    for _ in range(4):
        v = (1 - omega) * v - omega * rho * torch.logsumexp(scores + u[..., :, None], -2)
        u = (1 - omega) * u - omega * rho * torch.logsumexp(scores + v[..., None, :], -1)
    if tau is None:
        u = u - u.mean(-1, keepdim=True)
    v = -rho * torch.logsumexp(scores + u[..., :, None], -2)  # the tail is plain
    u = -rho * torch.logsumexp(scores + v[..., None, :], -1)
    assert torch.allclose(found.row_potential, u, atol=1e-12) and torch.allclose(found.col_potential, v, atol=1e-13)


@engines
def test_a_line_without_support_forgets_its_warm_start(engine: str) -> None:
    """Its potential is 0 after the first iteration, as in a plain base, not what over-relaxation would leave of it."""
    q, k = torch.zeros(1, 2, 3, dtype=D), torch.zeros(1, 8, 3, dtype=D)
    warm = torch.ones(1, 2, dtype=D), torch.ones(1, 8, dtype=D)
    options = {"window": (0, 0), "relaxation": 1.0, "tail_iters": 0, "initial_potentials": warm, "engine": engine}
    dead = sinkhorn_plan(q, k, **options).sum(-2)[0] == 0
    assert dead.any()
    for omega in (1.0, 1.5):
        assert (aux_of(q, k, over_relaxation=omega, base_iters=2, **options).col_potential[0, dead] == 0).all()


def test_over_relaxation_balances_a_band_sooner() -> None:
    q, k, _ = tensors(2, 96, 16)
    plain, mild, strong = (
        aux_of(q, k, window=(6, 6), base_iters=80, over_relaxation=omega).col_residual for omega in (1.0, 1.3, 1.7)
    )
    assert (mild < plain / 2).all() and (strong < plain / 100).all()
    rate = certify(q, k, window=(6, 6), base_iters=2000).rate
    best = float((2 / (1 + (1 - rate).sqrt())).mean())  # what the docstring names
    assert (aux_of(q, k, window=(6, 6), base_iters=80, over_relaxation=best).col_residual < plain / 1e4).all()


def test_over_relaxed_rows_are_still_exact_averages() -> None:
    q, k, _ = tensors(2, 12, 4)
    for tail in (0, 1):
        plan = sinkhorn_plan(q, k, base_iters=3, tail_iters=tail, over_relaxation=1.7)
        assert torch.allclose(plan.sum(-1), torch.ones(2, 12, dtype=D), atol=1e-12)


# Tolerance


@engines
@pytest.mark.parametrize("tolerance", slow_after(1, [1e-1, 1e-3], {1e-3}))
@pytest.mark.parametrize("name", slow_after(1, OPTIONS))
def test_early_stopping_equals_fewer_iterations(engine: str, tolerance: float, name: str) -> None:
    q, k, v = tensors(1, 12, 4)
    options = {"engine": engine, **OPTIONS[name]}
    (t,) = stopping_times(q, k, tolerance, **{x: y for x, y in options.items() if x != "tail_iters"}).tolist()
    assert 1 < t < 60
    found = sinkhorn_attention(q, k, v, base_iters=60, tolerance=tolerance, **options)
    assert torch.allclose(found, sinkhorn_attention(q, k, v, base_iters=t, **options), atol=1e-12, rtol=0)
    for other in (t - 1, t + 1):
        assert not torch.allclose(found, sinkhorn_attention(q, k, v, base_iters=other, **options), atol=1e-9, rtol=0)


@engines
@pytest.mark.parametrize("omega", [1.0, 1.4, 0.7])
def test_the_tolerance_is_of_the_largest_relative_column_error(engine: str, omega: float) -> None:
    """And, over-relaxed, of what the plain half-step would move, not of what the over-relaxed one does."""
    q, k, v = tensors(1, 9, 4, scale=2.0)
    options = {"over_relaxation": omega, "engine": engine}
    error = changes(q, k, 3, **options).max().item()
    if omega == 1:
        plan = sinkhorn_plan(q, k, base_iters=3, tail_iters=0)
        assert math.isclose(error, plan.sum(-2).log().abs().max().item(), rel_tol=1e-12)
    for factor, t in ((1.001, 3), (0.999, 4)):
        found = sinkhorn_attention(q, k, v, tolerance=factor * error, **options)
        assert torch.allclose(found, sinkhorn_attention(q, k, v, base_iters=t, **options), atol=1e-12, rtol=0)


@engines
@pytest.mark.parametrize("tail", [0, 2])
def test_every_head_stops_on_its_own(engine: str, tail: int) -> None:
    q, k, v = tensors(2, 3, 12, 4)
    q = q * torch.tensor([[0.3, 1.0, 2.5], [4.0, 0.1, 1.5]], dtype=D)[..., None, None]
    options = {"base_iters": 60, "tail_iters": tail, "tolerance": 1e-2, "engine": engine}
    assert len(stopping_times(q, k, 1e-2).unique()) >= 4
    together = sinkhorn_attention(q, k, v, **options)
    for i, h in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        alone = sinkhorn_attention(q[i, h, None], k[i, h, None], v[i, h, None], **options)
        assert torch.allclose(together[i, h, None], alone, atol=1e-12)


@engines
@pytest.mark.parametrize("dustbin", slow_after(1, [Dustbin(0.5, -0.5), None]), ids=["dustbin", "no dustbin"])
@pytest.mark.parametrize("omega", slow_after(1, [1.0, 1.3]))
def test_packed_equals_separate(engine: str, dustbin: Dustbin | None, omega: float) -> None:
    q, k, v = tensors(2, 15, 4, seed=3)
    ids = torch.tensor([-1, 0, 0, 0, 0, -1, 1, 1, 1, 1, 1, 2, 2, 2, -1])
    q = q * torch.tensor([0.1, 2.0, 3.0, 0.5], dtype=D)[ids.clamp(min=0), None]
    options = {"base_iters": 60, "tolerance": 1e-2, "dustbin": dustbin, "over_relaxation": omega, "engine": engine}
    packed = sinkhorn_attention(q, k, v, query_segment_ids=ids, key_segment_ids=ids, **options)
    times = []
    for g in range(3):
        own = [x[:, ids == g] for x in (q, k, v)]
        assert torch.allclose(packed[:, ids == g], sinkhorn_attention(*own, **options), atol=1e-12)
        times.append(stopping_times(own[0], own[1], 1e-2, dustbin=dustbin, over_relaxation=omega))
    assert len(torch.stack(times).unique()) >= 3


@engines
def test_a_good_warm_start_ends_after_one_iteration(engine: str) -> None:
    """One: what a start is worth is known after it, and the base never leaves the start as it is."""
    q, k, v = tensors(1, 10, 4, scale=2.0)
    aux = aux_of(q, k, base_iters=10, tail_iters=0)
    options = {"initial_potentials": (aux.row_potential, aux.col_potential), "engine": engine}
    assert 0 < changes(q, k, 10).max() < 1e-2 and stopping_times(q, k, 1e-2).item() > 5  # from a cold start
    found = sinkhorn_attention(q, k, v, base_iters=60, tolerance=1e-2, **options)
    assert torch.allclose(found, sinkhorn_attention(q, k, v, base_iters=1, **options), atol=1e-12, rtol=0)
    assert not torch.allclose(found, sinkhorn_attention(q, k, v, base_iters=0, **options), atol=1e-9)


@pytest.mark.parametrize("looking", [True, False])
def test_the_loop_ends_where_looking_is_free(looking: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere the problems that are done stand still, to the same result."""
    q, k, v = tensors(2, 12, 4)
    last = int(stopping_times(q, k, 1e-3).max())
    truth = sinkhorn_attention(q, k, v, base_iters=60, tolerance=1e-3, engine="tiled")
    steps = [0]
    half_step = tiles.Tiles.column_half_step

    def counted(*arguments: Any) -> Tensor:
        steps[0] += 1
        return half_step(*arguments)

    monkeypatch.setattr(tiles.Tiles, "column_half_step", counted)
    monkeypatch.setattr(reference, "can_look", lambda x: looking)
    assert torch.equal(sinkhorn_attention(q, k, v, base_iters=60, tolerance=1e-3, engine="tiled"), truth)
    assert steps[0] == (last + 1 if looking else 60) + 2  # and those of the tail


@engines
def test_the_defaults_are_the_plain_base(engine: str) -> None:
    """No tolerance never stops, even at a fixed point, where nothing moves any more."""
    q, k, v = torch.zeros(3, 1, 4, 2, dtype=D)
    seen = [
        sinkhorn_attention(q, k, v, engine=engine, **options)
        for options in ({}, {"tolerance": 0}, {"tolerance": None, "over_relaxation": 1})
    ]
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    problem = prepare(q, k, v).problem
    assert (problem.solver.tolerance, problem.solver.over_relaxation) == (0.0, 1.0)
    steps = [0]

    def column(u: Tensor, v: Tensor) -> Tensor:
        steps[0] += 1
        return v

    reference.stopped_base(q[..., 0], q[..., 0], column, column, problem)
    assert steps[0] == 2 * 20


# Bad input


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, r"tolerance=-0.1 must be 0 or more; None", {"tolerance": -0.1}),
        (ValueError, "tolerance=nan must be finite", {"tolerance": math.nan}),
        (ValueError, "tolerance=inf must be finite", {"tolerance": math.inf}),
        (TypeError, "tolerance must be a number, got 'small'", {"tolerance": "small"}),
        (TypeError, "tolerance must be a number, got True", {"tolerance": True}),
        (TypeError, "tolerance must be a Python number, got a tensor", {"tolerance": torch.tensor(0.1)}),
        (ValueError, "over_relaxation=0.0 must lie between 0 and 2, both excluded", {"over_relaxation": 0}),
        (ValueError, "over_relaxation=2.0 must lie", {"over_relaxation": 2}),
        (ValueError, "over_relaxation=nan must be finite", {"over_relaxation": math.nan}),
        (TypeError, "over_relaxation must be a number, got None", {"over_relaxation": None}),
        (TypeError, "over_relaxation must be a number, got '1'", {"over_relaxation": "1"}),
        (TypeError, "over_relaxation must be a number, got True", {"over_relaxation": True}),
        (ValueError, "over_relaxation is a constant", {"over_relaxation": torch.ones((), requires_grad=True)}),
        (ValueError, "tolerance=0.1 needs a stopped base.*Use gradient='tail'", {"tolerance": 0.1}),
        (ValueError, "over_relaxation=1.5 needs a stopped base.*leave tolerance=None", {"over_relaxation": 1.5}),
    ],
)
def test_bad_options_are_refused_everywhere(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    if "stopped base" in message:
        options = {**options, "gradient": "unrolled"}
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


# Gradients


@engines
@pytest.mark.parametrize(
    "options", slow_after(1, [{"tolerance": 1e-2}, {"over_relaxation": 1.5}, {"tolerance": 0.1, "tail_iters": 1}])
)
def test_gradients_are_exact_for_the_surrogate(engine: str, options: dict[str, Any]) -> None:
    """The surrogate is the tail from constant duals: those of this base, whatever they are."""
    q, k, v = (x.requires_grad_() for x in tensors(2, 6, 3))
    prepared = prepare(q.detach(), k.detach(), v.detach(), **options)
    duals = tiled.solve(prepared.inputs, prepared.problem)
    start = (duals.row[0, 0], duals.col[0, 0])
    tail = options.get("tail_iters", 2)

    def surrogate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sinkhorn_attention(q, k, v, base_iters=0, tail_iters=tail, initial_potentials=start, engine="reference")

    out, truth = sinkhorn_attention(q, k, v, engine=engine, **options), surrogate(q, k, v)
    assert torch.allclose(out, truth, atol=1e-12)
    for x, y in zip(*(torch.autograd.grad(o.sin().sum(), (q, k, v)) for o in (out, truth)), strict=True):
        assert torch.allclose(x, y, atol=1e-12)
    assert torch.autograd.gradcheck(surrogate, (q, k, v))


def test_second_derivatives_take_the_same_base() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(1, 5, 3))
    found = []
    for engine in ("tiled", "reference"):
        out = sinkhorn_attention(q, k, v, tolerance=0.1, over_relaxation=1.4, engine=engine)
        (first,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), k)[0])
    assert torch.allclose(*found, atol=1e-12)


@pytest.mark.slow
@engines
@pytest.mark.parametrize("packed", slow_after(0, [False, True], {True}))
def test_compiled_and_vmapped_equal_eager(engine: str, packed: bool) -> None:
    q, k, v = tensors(3, 2, 10, 4, scale=2.0)
    ids = torch.tensor([0] * 4 + [1] * 6)
    options = {"tolerance": 1e-2, "over_relaxation": 1.2, "base_iters": 12, "engine": engine}
    options |= {"query_segment_ids": ids, "key_segment_ids": ids} if packed else {}

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sinkhorn_attention(q, k, v, **options)

    eager = function(q, k, v)
    assert not torch.allclose(eager, sinkhorn_attention(q, k, v, **(options | {"tolerance": None})), atol=1e-6)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(q, k, v), eager, atol=1e-12)
    assert torch.allclose(torch.vmap(function)(q, k, v), eager, atol=1e-12)


# Certificates


def test_over_relaxation_leaves_only_the_implicit_bound() -> None:
    q, k, _ = tensors(2, 6, 4, scale=0.5)
    plain, over = (certify(q, k, over_relaxation=omega) for omega in (1.0, 1.4))
    assert plain.bias_bound.isfinite().all() and over.bias_bound.isinf().all()
    assert over.implicit_bias_bound.isfinite().all() and (over.measured_bias <= over.implicit_bias_bound).all()
    assert (certify(q, k, over_relaxation=1.4, base_iters=0).bias_bound == 0).all()  # no half-step is over-relaxed


def test_the_bound_holds_when_the_base_stops_early() -> None:
    q, k, v = (x[None] for x in tensors(1, 6, 4, seed=2))
    cotangent = torch.randn(1, 1, 6, 4, generator=torch.Generator().manual_seed(5), dtype=D)
    t = int(stopping_times(q, k, 1e-2))
    assert 1 < t < 20
    options = {"value": v, "grad_output": cotangent, "exact_diameter": True}
    found, shorter = certify(q, k, tolerance=1e-2, **options), certify(q, k, base_iters=t, **options)
    assert torch.allclose(found.dropped, shorter.dropped) and (shorter.bias_bound < found.bias_bound).all()
    zero = torch.zeros(6, 6, dtype=D, requires_grad=True)
    gradients = [
        torch.autograd.grad(sinkhorn_attention(q, k, v, zero, **given), zero, cotangent)[0]
        for given in ({"tolerance": 1e-2}, {"base_iters": t, "gradient": "unrolled"})
    ]
    assert 0 < (gradients[0] - gradients[1]).abs().sum() <= found.bias_bound.item()


BASE = {"tolerance": 0.05, "over_relaxation": 1.4}


def test_the_module_passes_them_on() -> None:
    module = SinkhornMultiheadAttention(8, 2, batch_first=True, dtype=D, **BASE)
    assert (module.tolerance, module.over_relaxation) == (0.05, 1.4) and "over_relaxation=1.4" in repr(module)
    x = 8 * torch.randn(2, 9, 8, dtype=D)
    output, weights = module(x, x, x, average_attn_weights=False)
    q, k, _ = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in F.linear(x, module.in_proj_weight).chunk(3, -1))
    assert torch.allclose(weights, sinkhorn_plan(q, k, **BASE), atol=1e-12)
    assert torch.allclose(output, module(x, x, x, need_weights=False)[0], atol=1e-12)
    for name in BASE:  # both matter here
        assert not torch.allclose(weights, sinkhorn_plan(q, k, **(BASE | {name: {"tolerance": None}.get(name, 1.0)})))


def test_replace_attention_takes_them() -> None:
    module = nn.MultiheadAttention(8, 2)
    report = replace_attention(module, **BASE)
    assert report.replaced == ("",) and (module.tolerance, module.over_relaxation) == (0.05, 1.4)
    plain = nn.MultiheadAttention(8, 2)
    replace_attention(plain, tolerance=0)
    assert replace_attention(plain).skipped == {"": "was replaced before, with these options"}


def test_register_transformers_takes_them() -> None:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=4
    )
    model, image = transformers.ViTModel(config).double().eval(), 9 * torch.randn(1, 3, 16, 16, dtype=D)

    def run(**options: Any) -> Tensor:
        register_transformers("sinkhorn_base_options", epsilon=1e-3, **options)  # a new model's scores are small
        model.set_attn_implementation("sinkhorn_base_options")
        return model(image).last_hidden_state

    short = run(base_iters=1)
    assert torch.allclose(run(tolerance=1e9), short, atol=1e-12)
    for other in ({}, {"base_iters": 1, "over_relaxation": 1.5}):
        assert not torch.allclose(run(**other), short, atol=1e-6)
    with pytest.raises(ValueError, match="needs a stopped base"):
        register_transformers("sinkhorn_base_options", over_relaxation=1.5, gradient="unrolled")
