"""docs/interactive: its JavaScript is the definition's iteration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from torch_sinkhorn_attn import Dustbin, sinkhorn_plan

mini_racer = pytest.importorskip("py_mini_racer", reason="runs JavaScript")
SOURCE = Path(__file__).parents[2] / "docs/interactive/transport.js"


@pytest.fixture(scope="module")
def script() -> Any:
    context = mini_racer.MiniRacer()
    context.eval(SOURCE.read_text())
    return context


def javascript(script: Any, scores: torch.Tensor, **options: Any) -> dict[str, Any]:
    call = f"JSON.stringify(Transport.solve({json.dumps(scores.tolist())}, {json.dumps(options)}))"
    found: dict[str, Any] = json.loads(script.eval(call))
    return found


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (3, 7), (6, 2)])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("iterations", [0, 1, 2, 22, 200])
@pytest.mark.parametrize("dustbin", [None, -0.5])
def test_it_is_the_definition(
    shape: tuple[int, int], epsilon: float, iterations: int, dustbin: float | None, script: Any
) -> None:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
    own = {} if dustbin is None else {"dustbin": Dustbin(dustbin, dustbin)}
    base = {"base_iters": max(iterations - 1, 0), "tail_iters": min(iterations, 1)}
    truth = sinkhorn_plan(scores, scale=1.0, epsilon=epsilon, engine="reference", **base, **own)
    found = javascript(script, scores, epsilon=epsilon, iterations=iterations, dustbin=dustbin)
    assert torch.allclose(torch.tensor(found["plan"], dtype=torch.float64), truth, rtol=1e-10, atol=1e-12)
    assert len(found["history"]) == iterations + 1


def test_softmax(script: Any) -> None:
    scores = torch.randn(5, 3, dtype=torch.float64)
    call = f"JSON.stringify(Transport.softmax({json.dumps(scores.tolist())}, {{epsilon: 0.5}}))"
    found = json.loads(script.eval(call))
    assert torch.allclose(torch.tensor(found, dtype=torch.float64), (scores / 0.5).softmax(-1), rtol=1e-12)


def test_scores_of_sharp_problems_stay_finite(script: Any) -> None:
    scores = 400 * torch.randn(5, 5, dtype=torch.float64)
    found = javascript(script, scores, epsilon=0.005, iterations=22)
    assert all(x is not None for row in found["plan"] for x in row)  # JSON has no NaN: it writes null


def test_epsilon_must_be_positive(script: Any) -> None:
    with pytest.raises(mini_racer.JSEvalException, match="epsilon=0 must be positive"):
        javascript(script, torch.zeros(2, 2), epsilon=0)
