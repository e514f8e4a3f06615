"""Sharpness and shift of the last plan, found again where they are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from examples.pfam import plan_calibration
from examples.pfam.attentions import AttentionProblem
from examples.pfam.config import Config
from examples.pfam.model import Aligner
from examples.pfam.pairs import Family, Pair
from examples.pfam.plan_calibration import fit_plans
from examples.pfam.sampler import collate
from torch_sinkhorn_attn import Dustbin


def single_pairs(scores: torch.Tensor) -> AttentionProblem:
    """Of one residue a side, [N]: aligned or not."""
    count, ones = len(scores), torch.ones(len(scores), dtype=torch.long)
    options = {"scale": 1.0, "base_iters": 60, "tail_iters": 2, "query_lengths": ones, "key_lengths": ones}
    zero = torch.zeros(count, 1, 1)
    return AttentionProblem(
        torch.zeros(count, 1, 1, 1),
        torch.zeros(count, 1, 1, 1),
        scores[:, None, None, None],
        {**options, "dustbin": Dustbin(zero, zero)},
    )


def test_scores_are_sharpened_and_the_dustbin_is_shifted() -> None:
    scores = torch.linspace(-3, 3, 9)
    plan = single_pairs(scores).plan()
    assert torch.equal(single_pairs(scores).calibrated(1.0, 0.0).plan(), plan)
    torch.testing.assert_close(single_pairs(scores / 2).calibrated(2.0, 0.0).plan(), plan)
    # A pair has one score, and what it is worth more than two dustbins is what counts.
    torch.testing.assert_close(single_pairs(scores + 0.8).calibrated(1.0, 0.4).plan(), plan, atol=1e-4, rtol=1e-4)
    assert (single_pairs(scores).calibrated(1.0, 0.4).plan()[:, 0, 0] < plan[:, 0, 0]).all()


@pytest.mark.parametrize(("sharpness", "shift"), [(1.6, 0.0), (0.7, -0.4)])
def test_what_was_taken_off_is_found_again(monkeypatch: pytest.MonkeyPatch, sharpness: float, shift: float) -> None:
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.normal(0, 3, 6000)).float()
    chance = single_pairs(scores).calibrated(sharpness, shift).plan()[:, 0, 0].numpy()
    none, one = np.zeros((0, 2), dtype=np.int64), np.zeros((1, 2), dtype=np.int64)
    side = np.zeros(1, dtype=np.int64)
    pairs = [Pair("F", ("a", "b"), side, side, one if right else none) for right in rng.random(6000) < chance]
    monkeypatch.setattr(plan_calibration, "_problems", lambda model, of: [(single_pairs(scores), pairs)])
    monkeypatch.setattr(plan_calibration, "calibration_pairs", lambda families: (pairs, []))
    monkeypatch.setattr(plan_calibration, "_FLOOR", 1e-6)
    model = Aligner(Config(dim=24))
    families: list[Family] = []
    fit_plans(model, families)
    assert model.calibration.tolist() == pytest.approx([sharpness, shift], abs=0.12)


def test_it_changes_the_last_plan_in_evaluation_alone() -> None:
    torch.manual_seed(0)
    model = Aligner(Config(dim=24, dropout=0.0))
    query, key = np.random.default_rng(0).integers(0, 20, (2, 30))
    batch = collate([Pair("F", ("a", "b"), query, key, np.zeros((0, 2), dtype=np.int64))])
    with torch.no_grad():
        before = [model.train(training)(batch) for training in (True, False)]
        model.calibration.copy_(torch.tensor([1.5, 0.2]))
        after = [model.train(training)(batch) for training in (True, False)]
        problem, plan = model.eval().solve(batch)[-1]
    assert torch.equal(before[0].last, after[0].last) and torch.equal(before[1].first, after[1].first)
    assert not torch.allclose(before[1].last, after[1].last, atol=1e-3)
    assert torch.equal(plan, after[1].last)
    assert torch.equal(problem.plan(), plan), "what certificates and pictures see is the plan that is shown"
