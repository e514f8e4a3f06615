"""Plans, values, gradients and divergences against POT, GeomLoss and OTT-JAX: the numbers stored of them, and the peers
themselves where they are installed. `problems` has the conventions, `remake` writes the numbers."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peers.problems import PROBLEMS, D, PointProblem
from peers.solvers import SOLVERS
from torch import Tensor

from torch_sinkhorn_attn import sinkhorn_cost, sinkhorn_divergence, sinkhorn_plan

STORED: dict[str, Any] = json.loads((Path(__file__).parent / "values.json").read_text())
PAIRS = [(peer, name) for peer in SOLVERS for name in PROBLEMS if name in STORED[peer]]
ENGINES = ["reference", "tiled", "cpu"]


def bound(peer: str, what: str) -> float:
    """What a peer reaches by itself, of the largest entry. GeomLoss anneals its temperature down to epsilon to the end;
    ott's divergence solves (x, x) and (y, y) by averaged steps that stop short of its threshold."""
    if peer == "GeomLoss":
        return 3e-5 if what in ("value", "divergence") else 5e-3
    return 1e-6 if (peer, what) == ("OTT-JAX", "divergence") else 1e-10


def options(p: PointProblem, engine: str | None = None) -> dict[str, Any]:
    relaxation = None if p.tau == (None, None) else p.tau
    masses = {"row_mass": p.a, "col_mass": p.b}
    return masses | {"epsilon": p.epsilon, "relaxation": relaxation, "base_iters": 2000, "engine": engine}


@cache
def plan_of(name: str, engine: str | None = None) -> Tensor:
    """Relaxed, the plan of attention has another reference measure, 1 1^T, so scores bring a b^T with them."""
    p = PROBLEMS[name]
    reference = 0.0 if p.tau == (None, None) else p.epsilon * (p.a[:, None] * p.b).log()
    return sinkhorn_plan(reference - p.cost, **options(p, engine))


@cache
def ours(name: str, engine: str | None = None) -> dict[str, Tensor]:
    p = PROBLEMS[name]
    x = p.x.clone().requires_grad_()
    cost = sinkhorn_cost(-(x[:, None] - p.y[None]).square().sum(-1), **options(p, engine))
    assert torch.allclose(cost.dual, cost.primal, rtol=1e-12)
    found = {"value": cost.dual, "linear": cost.linear, "plan": plan_of(name, engine)}
    found["grad_x"] = torch.autograd.grad(cost.dual, x)[0]
    if p.tau[0] == p.tau[1]:
        found["divergence"] = sinkhorn_divergence(
            x, p.y, epsilon=p.epsilon, x_mass=p.a, y_mass=p.b, relaxation=p.tau[0], base_iters=2000, tolerance=None,
            engine=engine,
        )  # fmt: skip
        found["divergence_grad_x"] = torch.autograd.grad(found["divergence"], x)[0]
    return {what: x.detach() for what, x in found.items()}


def compare(peer: str, name: str, stored: dict[str, Any], engine: str | None = None) -> None:
    p, mine = PROBLEMS[name], ours(name, engine)
    for what, numbers in stored.items():
        if what in mine:
            theirs = torch.tensor(numbers, dtype=D)
            error = float((theirs - mine[what]).abs().max() / mine[what].abs().max())
            assert error < bound(peer, what), (what, error)
    assert {"value", "linear", "plan"} <= stored.keys()
    if "f" in stored:
        f, g = (torch.tensor(stored[side], dtype=D) for side in "fg")
        log_plan = (p.a[:, None] * p.b).log() + (f[:, None] + g - p.cost) / p.epsilon
        assert torch.allclose(log_plan, mine["plan"].log(), atol=1e-8)


@pytest.mark.parametrize(("peer", "name"), PAIRS)
def test_the_numbers_stored_of_peers_are_ours(peer: str, name: str) -> None:
    compare(peer, name, STORED[peer][name])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_engine_has_them(name: str, engine: str) -> None:
    for peer in ("POT", "OTT-JAX"):
        compare(peer, name, STORED[peer][name], engine)


def test_every_peer_has_what_it_can() -> None:
    assert [len(STORED[peer]) - 1 for peer in SOLVERS] == [6, 5, 6]
    assert all("divergence" in STORED[peer][name] for peer in ("GeomLoss", "OTT-JAX") for name in list(PROBLEMS)[:5])
    gradients = {peer: sum("grad_x" in STORED[peer].get(name, {}) for name in PROBLEMS) for peer in SOLVERS}
    assert gradients == {"POT": 6, "GeomLoss": 3, "OTT-JAX": 3}


@pytest.mark.slow
@pytest.mark.parametrize(("peer", "name"), PAIRS)
def test_an_installed_peer_says_the_same(peer: str, name: str) -> None:
    module, solve = SOLVERS[peer]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{peer} is not installed")
    found = solve(PROBLEMS[name])
    assert found is not None and found.keys() == STORED[peer][name].keys()
    compare(peer, name, found)
