"""Plans and values against POT, GeomLoss and OTT-JAX: the values stored of them, and themselves where installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peers.problems import PROBLEMS, D, PointProblem
from peers.solvers import SOLVERS
from torch_sinkhorn_attn import sinkhorn_plan

STORED: dict[str, Any] = json.loads((Path(__file__).parent / "values.json").read_text())
ACCURACY = {"POT": 1e-9, "GeomLoss": 1e-6, "OTT-JAX": 1e-9}  # their own, float64
PAIRS = [(peer, name) for peer in SOLVERS for name in PROBLEMS if name in STORED[peer]]


def options(p: PointProblem) -> dict[str, Any]:
    relaxation = None if p.tau == (None, None) else p.tau
    return {"row_mass": p.a, "col_mass": p.b, "epsilon": p.epsilon, "relaxation": relaxation, "base_iters": 3000}


def plan_of(p: PointProblem, engine: str | None = None) -> Tensor:
    return sinkhorn_plan(-p.cost, engine=engine, **options(p))


def compare(found: dict[str, Any], p: PointProblem, bound: float) -> None:
    """A peer's numbers with each other and with our plan, by the definition of `problems`."""
    plan = plan_of(p)
    if "plan" in found:
        assert torch.allclose(torch.tensor(found["plan"], dtype=D), plan, rtol=bound, atol=bound)
    if "linear" in found:
        assert found["linear"] == pytest.approx(float((plan * p.cost).sum()), rel=bound)
    if "f" in found:
        f, g = (torch.tensor(found[name], dtype=D) for name in "fg")
        ours = plan.log() - (p.a[:, None] * p.b).log()
        assert torch.allclose((f[:, None] + g - p.cost) / p.epsilon, ours, atol=10 * bound / p.epsilon)
    assert found["value"] == pytest.approx(value_of(p, plan), rel=bound)
    gradient = torch.tensor(found["grad_x"], dtype=D) if "grad_x" in found else None
    if gradient is not None:  # the envelope: of sum P C at a fixed plan
        ours = 2 * (plan.sum(1)[:, None] * p.x - plan @ p.y)
        assert torch.allclose(gradient, ours, rtol=bound, atol=10 * bound)


def value_of(p: PointProblem, plan: Tensor) -> float:
    def kl(found: Tensor, wanted: Tensor) -> Tensor:
        return (found * (found / wanted).log() - found + wanted).sum()

    total = (plan * p.cost).sum() + p.epsilon * kl(plan, p.a[:, None] * p.b)
    for tau, found, wanted in zip(p.tau, (plan.sum(1), plan.sum(0)), (p.a, p.b), strict=True):
        total = total + (0.0 if tau is None else tau * kl(found, wanted))
    return float(total)


@pytest.mark.parametrize(("peer", "name"), PAIRS)
def test_stored_values_are_ours(peer: str, name: str) -> None:
    compare(STORED[peer][name], PROBLEMS[name], ACCURACY[peer])


@pytest.mark.parametrize("engine", ["reference", "tiled", "cpu"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_engine_gives_ott_s_plan(name: str, engine: str) -> None:
    stored = torch.tensor(STORED["OTT-JAX"][name]["plan"], dtype=D)
    assert torch.allclose(plan_of(PROBLEMS[name], engine), stored, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", PROBLEMS)
def test_peers_agree_on_divergences(name: str) -> None:
    found = [STORED[peer][name] for peer in ("GeomLoss", "OTT-JAX") if "divergence" in STORED[peer].get(name, {})]
    assert len(found) == 2 * (name != "one side relaxed")
    if found:
        assert found[0]["divergence"] == pytest.approx(found[1]["divergence"], rel=1e-5)
        gradients = [torch.tensor(x["divergence_grad_x"], dtype=D) for x in found]
        assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("peer", "name"), PAIRS)
def test_an_installed_peer_still_says_so(peer: str, name: str) -> None:
    module, solve = SOLVERS[peer]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{peer} is not installed")
    found = solve(PROBLEMS[name])
    assert found is not None
    compare(found, PROBLEMS[name], ACCURACY[peer])
    for what, stored in STORED[peer][name].items():
        now, then = torch.tensor(found[what], dtype=D), torch.tensor(stored, dtype=D)
        if what not in "fg":  # which have a constant to choose
            assert torch.allclose(now, then, rtol=10 * ACCURACY[peer], atol=10 * ACCURACY[peer])
