"""Advice is what was measured: who follows it is balanced."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from marks import slow_after
from torch import Tensor

from torch_sinkhorn_attn import Dustbin, certify, residual_history, set_checks
from torch_sinkhorn_attn.thermometer import advice


def normal(*shape: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for _ in range(2)]


def settings(text: str) -> list[dict[str, Any]]:
    """The options of each setting that the words name."""
    return [
        {name: eval(x) for name, x in re.findall(r"(\w+)=('\w+'|[\d.]+\d|\d)", part)}
        for part in text.split(": ")[-1].split(", or ")
    ]


CASES: dict[str, dict[str, Any]] = {
    "sharp": {"epsilon": 0.15},
    "sharper": {"epsilon": 0.1},
    "band": {"window": (4, 4), "epsilon": 0.25},
    "dustbin": {"epsilon": 0.1, "dustbin": Dustbin(0.0, 0.0)},
    "one iteration": {"base_iters": 0, "tail_iters": 1},
    "no tail": {"tail_iters": 0, "epsilon": 0.1},
    "over-relaxed": {"epsilon": 0.1, "over_relaxation": 0.7},
    "accelerated": {"epsilon": 0.1, "acceleration": "chebyshev", "base_iters": 6},
    "unrolled": {"epsilon": 0.1, "gradient": "unrolled"},
    "implicit": {"epsilon": 0.1, "gradient": "implicit"},
    "relaxed": {"epsilon": 0.1, "relaxation": 3.0},
    "one side": {"epsilon": 0.1, "relaxation": (3.0, None)},
}


@pytest.mark.parametrize("mode", ["exact", "quick"])
@pytest.mark.parametrize("name", slow_after(4, CASES))
def test_who_follows_it_is_balanced(name: str, mode: str) -> None:
    q, k = normal(1, 100, 32)
    options = CASES[name]
    text = certify(q, k, mode=mode, **options).advice
    error = float(residual_history(q, k, **options)[0, -1])
    assert f"of the problem {'is off' if name != 'relaxed' else 'still moves'} by" in text and error > 0.01
    assert abs(float(re.search(r"by ([\d.e+]+) %", text)[1]) - 100 * error) < error
    assert text.endswith(", reaches 1 %.") or text.endswith(" reaches 1 %.")
    found = settings(text.replace(", reaches", "").replace(" reaches", ""))
    assert found and (name in ("unrolled", "one iteration")) == all(set(x) == {"base_iters"} for x in found)
    for setting in found:
        plain = {"over_relaxation": 1.0, "acceleration": None, "contraction": None}
        after = residual_history(q, k, **{**options, **plain, **setting})
        assert float(after[0, -1]) <= 0.01 * (1 + 1e-3), setting
        assert setting["base_iters"] >= options.get("base_iters", 20) or "acceleration" in setting


def test_it_is_of_the_slowest_problem() -> None:
    """Which it names, by batch element, head and segment."""
    q, k = normal(2, 3, 40, 16)
    q[1, 2] *= 6
    c = certify(q, k, mode="quick")
    assert "A column sum of problem (1, 2), the slowest, is off by" in c.advice and str(c).endswith(c.advice)
    ids = torch.tensor([0] * 20 + [1] * 20).expand(2, -1)
    packed = certify(q, k, query_segment_ids=ids, key_segment_ids=ids, mode="quick").advice
    assert re.search(r"problem \(1, 2, [01]\), the slowest", packed)
    scores = q[1] @ k[1].transpose(-1, -2) / 4
    lengths = torch.tensor([40, 40, 30])
    assert "problem (2,), the slowest" in certify(scores, query_lengths=lengths, key_lengths=lengths).advice


@pytest.mark.parametrize("mode", ["exact", "quick"])
def test_none_where_none_is_needed_or_asked_for(mode: str) -> None:
    q, k = normal(2, 30, 16)
    assert certify(q, k, mode=mode).advice == ""
    assert certify(q, k, mode=mode, base_iters=0, tail_iters=0).advice == ""  # softmax asks for no columns
    assert certify(q, k, mode=mode, epsilon=0.1, advise=False).advice == ""
    assert certify(q, k, mode=mode, relaxation=1.0).advice == ""


def test_where_nothing_helps() -> None:
    q, k = normal(1, 100, 32)
    text = certify(q, k, epsilon=1e-3, mode="quick").advice
    assert "nothing tried reaches 1 %" in text and text.endswith(
        "A larger epsilon, or relaxation, takes fewer iterations."
    )
    q[0, 3] = torch.nan
    assert certify(q, k, mode="quick").advice == advice.NOT_FINITE == certify(q, k).advice


def test_where_no_plan_exists() -> None:
    set_checks("never")
    q, k = normal(2, 12, 16)
    mask = torch.ones(2, 12, 12, dtype=torch.bool)
    mask[1, :6, 3:] = False
    for mode in ("exact", "quick"):
        c = certify(q, k, mask, mode=mode)
        assert c.advice == c.reasons[0] and c.advice.startswith("attn_mask has no balanced plan")
    q[0] *= 20
    first, second = certify(q, k, mask, mode="quick").advice.splitlines()
    assert first == c.reasons[0] and "problem (0,), the slowest, is off" in second


def test_its_cost_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Iterations of one head, whatever the problem."""
    from torch_sinkhorn_attn.thermometer.passes import Passes

    taken: list[int] = []
    solve = Passes.solve

    def counted(self: Passes, *args: Any, **solver: Any) -> Any:
        base = solver.get("base_iters", self.problem.solver.base_iters)
        taken.append(self.problem.sizes[0] * self.problem.sizes[1] * (base + solver.get("tail_iters", 2)))
        return solve(self, *args, **solver)

    monkeypatch.setattr(Passes, "solve", counted)
    for epsilon in (0.3, 0.1, 0.03, 0.01, 1e-3):
        q, k = normal(4, 60, 8)
        taken.clear()
        certify(q, k, mode="quick", epsilon=epsilon)
        assert sum(taken[2:]) <= (advice.CALLS + advice.MOST) * 22, epsilon
