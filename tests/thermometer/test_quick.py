"""The quick certificate against the exact one: the same residuals and status, and a rate from below, near enough."""

from __future__ import annotations

import math
from typing import Any

import problems
import pytest
import torch
from conformance import ENGINES
from marks import slow_after
from torch import Tensor

from torch_sinkhorn_attn import Certificate, Dustbin, Status, certify, set_checks
from torch_sinkhorn_attn.method import reference
from torch_sinkhorn_attn.problem.arguments import prepare
from torch_sinkhorn_attn.thermometer import quick

D = torch.float64
KNOWN = ("row_residual_l1", "row_residual_max", "col_residual_l1", "col_residual_max", "rate", "status")
engines = pytest.mark.parametrize("engine", [*ENGINES, "reference"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=D).to(dtype) for _ in range(2)]


@engines
@pytest.mark.parametrize("seed", slow_after(12, range(80)))
def test_residuals_and_status_are_those_of_the_exact_mode(engine: str, seed: int) -> None:
    call = problems.make(seed, dropout=False)
    options = {**call.options, "engine": engine}
    exact = certify(call.query, call.key, call.mask, value=call.value, advise=False, **options)
    found = certify(call.query, call.key, call.mask, mode="quick", advise=False, **options)
    for name in KNOWN[:4]:
        one, other = getattr(found, name), getattr(exact, name)
        assert one.shape == other.shape and one.dtype == other.dtype
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-9), (name, call)
    assert torch.equal(found.status, exact.status)
    relaxed = call.options["relaxation"] is not None
    assert (found.rate >= exact.rate - 1e-9).all() if relaxed else True  # power iteration ends early, this does not
    assert ((found.rate >= 0) & (found.rate <= 1)).all()
    for name in set(Certificate.__dataclass_fields__) - {*KNOWN, "positive"}:
        assert getattr(found, name).isnan().all() and getattr(found, name).shape == exact.rate.shape
    assert found.positive is None and found.mode == "quick" and found.relative_bias.isnan().all()


def rate_by_singular_values(q: Tensor, k: Tensor, **options: Any) -> Tensor:
    """Of the plan that the engine returns in its own precision."""
    prepared = prepare(q, k, None, **options)
    _, at = quick.returned(prepared)
    wide = prepare(q.double(), k.double(), None, **options)
    scores = reference.dense_problem(wide.inputs, wide.problem).scores
    log_plan = scores + at.u.double()[..., :, None] + at.v.double()[..., None, :]
    r, c = log_plan.logsumexp(-1, keepdim=True), log_plan.logsumexp(-2, keepdim=True)
    return torch.linalg.svdvals((log_plan - r / 2 - c / 2).exp().nan_to_num(0.0))[..., 1] ** 2


# (1 - quick) / (1 - rate) is at most the number.
NEAR: dict[str, tuple[float, dict[str, Any]]] = {
    "dense": (1.05, {}),
    "sharp": (1.1, {"epsilon": 0.25}),
    "sharper, converged": (1.1, {"epsilon": 0.1, "base_iters": 1000}),
    "sharper": (15.0, {"epsilon": 0.1}),
    "band": (1.1, {"window": (16, 16)}),
    "narrow band": (1.15, {"window": (4, 4)}),
    "narrow band, converged": (1.15, {"window": (4, 4), "base_iters": 3000}),
    "sharp band": (2.0, {"window": (4, 4), "epsilon": 0.25}),
    "dustbin": (1.05, {"dustbin": Dustbin(0.0, 0.0)}),
    "sharp dustbin": (4.0, {"dustbin": Dustbin(0.0, 0.0), "epsilon": 0.1}),
    "accelerated": (1.1, {"window": (16, 16), "acceleration": "chebyshev"}),
    "lengths": (1.1, {"query_lengths": torch.tensor(100), "key_lengths": torch.tensor(80), "epsilon": 0.25}),
}


@engines
@pytest.mark.parametrize("name", slow_after(3, NEAR))
def test_the_rate_is_near_and_never_above(engine: str, name: str) -> None:
    most, options = NEAR[name]
    if engine != "cpu" and options.get("base_iters", 20) > 100:
        pytest.skip("the same numbers, slowly")
    options = {**options, "engine": engine}
    for seed in range(2):
        q, k = normal(3, 128, 32, seed=seed)
        truth = rate_by_singular_values(q, k, **options)
        found = certify(q, k, mode="quick", advise=False, **options).rate.double()
        ratio = (1 - found) / (1 - truth)
        assert (ratio <= most).all(), ratio
        assert (found <= truth + 2e-5).all()


@pytest.mark.slow
def test_the_rate_of_many_problems() -> None:
    """Half of them, slow and fast, within a hundredth of 1 - rate; nine in ten within 2."""
    ratios = []
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        n = int(torch.randint(16, 257, (1,), generator=g))
        epsilon = float(torch.empty(1).uniform_(math.log(0.08), math.log(2), generator=g).exp())
        window = None if seed % 2 else (int(torch.randint(2, 17, (1,), generator=g)),) * 2
        options: dict[str, Any] = {"epsilon": epsilon, "window": window}
        if seed % 5 == 1:
            options["dustbin"] = Dustbin(0.0, 0.0)
        q, k = normal(2, n, 32, seed=seed)
        truth = rate_by_singular_values(q, k, **options)
        found = certify(q, k, mode="quick", advise=False, **options).rate.double()
        assert (found <= truth + 2e-5).all()
        ratios.append((1 - found) / (1 - truth))
    every = torch.cat(ratios)
    assert every.median() < 1.05 and every.quantile(0.9) < 3


def test_components_of_a_mask_are_deflated() -> None:
    q, k = normal(2, 8, 4, seed=4)
    mask = torch.block_diag(torch.ones(3, 3), torch.ones(5, 5)).bool()[:, torch.randperm(8)]
    found = certify(q, k, mask, mode="quick", base_iters=500).rate
    assert torch.allclose(found, certify(q, k, mask, base_iters=500).rate, atol=1e-3) and (found < 0.95).all()


def test_packed_is_separate() -> None:
    q, k = normal(2, 20, 8, dtype=D)
    ids = torch.tensor([0] * 7 + [1] * 9 + [-1] * 4)
    options = {"epsilon": 0.3, "mode": "quick", "advise": False}
    packed = certify(q, k, query_segment_ids=ids, key_segment_ids=ids, **options)
    assert packed.rate.shape == (2, 20) and (packed.rate[:, 2:] == 0).all()
    for g in (0, 1):
        alone = certify(q[:, ids == g], k[:, ids == g], **options)
        for name in KNOWN:
            one, other = getattr(packed, name)[:, g], getattr(alone, name)
            assert torch.allclose(one.double(), other.double(), rtol=2e-2, atol=1e-9), name


def test_relaxed_rates_and_lines_without_support() -> None:
    """A side's rho is the rate; a token that a window leaves alone has a line of zeros, and a residual of its mass."""
    q, k = normal(2, 9, 4, dtype=D)
    assert torch.allclose(certify(q, k, relaxation=(1.0, 3.0), mode="quick").rate, torch.full((2,), 0.375, dtype=D))
    options = {"relaxation": 1.0, "window": (0, 0), "advise": False}
    for one, other in ((q, k[:, :4]), (q[:, :4], k), (0 * q, k[:, :4]), (0 * q[:, :4], k)):
        exact, found = (certify(one, other, mode=mode, **options) for mode in ("exact", "quick"))
        for name in KNOWN[:4]:
            assert torch.allclose(getattr(found, name), getattr(exact, name), atol=1e-12), name


@engines
def test_the_unit_of_mass(engine: str) -> None:
    """Residuals are in the caller's, however small."""
    q, k = normal(2, 9, 4)
    mass = torch.linspace(1, 2, 9) * 1e-30
    options = {"row_mass": mass, "epsilon": 0.2, "base_iters": 3, "advise": False, "engine": engine}
    exact, found = (certify(q, k, mode=mode, **options) for mode in ("exact", "quick"))
    assert torch.allclose(found.col_residual_l1, exact.col_residual_l1, rtol=1e-3, atol=0)
    assert (found.col_residual_max > 1e-33).all() and torch.equal(found.status, exact.status)


def test_it_takes_no_dense_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither tiles in Python nor the definition, where the kernels can."""
    from torch_sinkhorn_attn import certificates
    from torch_sinkhorn_attn.engines.tiled import tiles

    if "cpu" not in ENGINES:
        pytest.skip("without kernels tiles are all there is")
    for module, name in ((tiles, "Tiles"), (certificates, "Tiles"), (reference, "dense_problem")):
        monkeypatch.setattr(module, name, None)
    q, k = normal(2, 40, 8)
    for options in ({}, {"epsilon": 0.05}, {"window": (3, 3)}, {"dustbin": Dustbin(0.0, 0.0)}, {"relaxation": 1.0}):
        certify(q, k, mode="quick", **options)


def test_print() -> None:
    q, k = normal(2, 12, 4)
    lines = str(certify(q, k, mode="quick")).splitlines()
    assert len(lines) == 3 and lines[1].split()[4:][0] == "-" and lines[1].split()[-3:] == ["-", "-", "-"]
    assert str(certify(q, k, mode="quick", epsilon=0.02)).splitlines()[-1].startswith("not converged: 2 of 2. A column")
    bad = q.clone()
    bad[0, 3] = torch.nan
    assert " nan " in str(certify(bad, k, mode="quick"))
    set_checks("never")
    crowded = torch.ones(12, 12, dtype=torch.bool)
    crowded[:6, 3:] = False
    none = certify(q, k, crowded, mode="quick")
    assert (none.status == Status.NO_PLAN).all() and "no plan: 2 of 2. attn_mask has no balanced plan" in str(none)


def test_refusals() -> None:
    q, k = normal(2, 12, 4)
    with pytest.raises(ValueError, match="mode='fast'; choose one of 'exact', 'quick'"):
        certify(q, k, mode="fast")
    for options in ({"value": k}, {"value": k, "grad_output": q}, {"exact_diameter": True}):
        with pytest.raises(ValueError, match=f"certify got {next(iter(options))} with mode='quick'"):
            certify(q, k, mode="quick", **options)


@pytest.mark.parametrize("shape", [(2, 0, 4), (0, 2, 5, 4), (2, 1, 4)])
def test_edges(shape: tuple[int, ...]) -> None:
    q = torch.zeros(shape)
    for k in (q, torch.zeros(*shape[:-2], 3, shape[-1])):
        exact, found = (certify(q, k, mode=mode) for mode in ("exact", "quick"))
        assert torch.equal(found.status, exact.status) and torch.allclose(found.rate, exact.rate, atol=1e-6)
        assert torch.allclose(found.col_residual_max, exact.col_residual_max, atol=1e-6)


@pytest.mark.parametrize("mode", ["exact", "quick"])
def test_scores_in_place_of_query_and_key(mode: str) -> None:
    """`(..., H, L, S)`, `(L, S)`, and heads that are batch elements."""
    q, k = normal(2, 3, 12, 4)
    scores = q @ k.transpose(-1, -2) / 2
    both = certify(q, k, mode=mode, epsilon=0.3)
    given = certify(scores, mode=mode, epsilon=0.3)
    one = certify(scores[0, 0], mode=mode, epsilon=0.3)
    flat = certify(scores[0], mode=mode, epsilon=0.3, query_lengths=torch.tensor([12, 12, 7]))
    assert one.rate.shape == () and flat.rate.shape == (3,) and len(str(one).splitlines()) >= 2
    for name in KNOWN:
        x = getattr(both, name).double()
        assert torch.allclose(x, getattr(given, name).double(), rtol=1e-2, atol=1e-5), name
        assert torch.allclose(x[0, 0], getattr(one, name).double(), rtol=1e-2, atol=1e-5), name
        assert torch.allclose(x[0, :2], getattr(flat, name)[:2].double(), rtol=1e-2, atol=1e-5), name
