"""The posterior of alignments with affine gap costs, against every alignment written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from examples.pfam.baselines import GLOBAL_GAP, HALF_BIT, blosum62, needleman_wunsch
from examples.pfam.pair_hmm import log_posterior
from examples.pfam.pairs import encode


def by_enumeration(scores: Tensor, opening: float, extension: float) -> Tensor:
    """The probability of each pair of [n, m] scores: every alignment's weight, added up."""
    n, m = scores.shape
    found, total = torch.zeros(n, m, dtype=torch.float64), 0.0
    # Position, the last column, log weight, pairs so far.
    waiting: list[tuple[int, int, str, float, list[tuple[int, int]]]] = [(0, 0, "", 0.0, [])]
    while waiting:
        i, j, last, weight, pairs = waiting.pop()
        if (i, j) == (n, m):
            total += math.exp(weight)
            for pair in pairs:
                found[pair] += math.exp(weight)
        if i < n and j < m:
            waiting.append((i + 1, j + 1, "pair", weight + float(scores[i, j]), [*pairs, (i, j)]))
        if i < n:
            waiting.append((i + 1, j, "query", weight - (extension if last == "query" else opening), pairs))
        if j < m:
            waiting.append((i, j + 1, "key", weight - (extension if last == "key" else opening), pairs))
    return found / total


@pytest.mark.parametrize("costs", [(1.5, 0.4), (0.3, 0.3), (4.0, 0.0)])
def test_it_is_the_sum_over_every_alignment(costs: tuple[float, float]) -> None:
    scores = torch.randn(4, 5, 4, generator=torch.Generator().manual_seed(0))
    n, m = torch.tensor([5, 3, 1, 5]), torch.tensor([4, 4, 2, 1])
    found = log_posterior(scores, n, m, *costs)
    for index in range(4):
        active = (index, slice(int(n[index])), slice(int(m[index])))
        expected = by_enumeration(scores[active], *costs)
        torch.testing.assert_close(found[active].exp().double(), expected, atol=1e-6, rtol=1e-5)
        assert (found[index, int(n[index]) :] < -1e8).all() and (found[index, :, int(m[index]) :] < -1e8).all()


def test_the_order_of_the_sequences_and_their_direction_do_not_matter() -> None:
    scores = torch.randn(1, 40, 33, generator=torch.Generator().manual_seed(1))
    n, m = torch.tensor([40]), torch.tensor([33])
    found = log_posterior(scores, n, m, 3.0, 0.5)
    torch.testing.assert_close(log_posterior(scores.mT, m, n, 3.0, 0.5), found.mT, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(log_posterior(scores.flip(1, 2), n, m, 3.0, 0.5), found.flip(1, 2), atol=1e-4, rtol=1e-4)


def test_sharp_scores_give_the_needleman_wunsch_alignment() -> None:
    rng = np.random.default_rng(0)
    query = rng.integers(0, 20, 120)
    key = np.concatenate([query[:30], rng.integers(0, 20, 70), query[30:]])  # one insertion of seventy residues
    scores = torch.tensor(HALF_BIT * blosum62()[np.ix_(query, key)])[None].float()
    costs = (HALF_BIT * cost for cost in GLOBAL_GAP)
    found = log_posterior(scores, torch.tensor([120]), torch.tensor([190]), *costs)[0].exp()
    expected = needleman_wunsch(query, key)
    assert len(expected) == 120
    assert found[expected[:, 0], expected[:, 1]].mean() > 0.97
    assert float(found.sum(dim=1).max()) <= 1 + 1e-4 and float(found.sum(dim=0).max()) <= 1 + 1e-4


def test_thousands_of_residues_stay_finite() -> None:
    residues = encode("MKVLAWWGHPDEACDEFGHIKLMNPQRSTVWY" * 40)
    scores = torch.tensor(HALF_BIT * blosum62()[np.ix_(residues, residues[:900])])[None].float()
    found = log_posterior(scores, torch.tensor([len(residues)]), torch.tensor([900]), 5.2, 0.35)
    assert torch.isfinite(found).all() and float(found.max()) <= 0.0
    assert float(found.exp().sum()) == pytest.approx(900, rel=0.01)
