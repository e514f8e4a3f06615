"""Two numbers that make the entries of an aligner's plans the frequencies with which they are right.

Training pairs are mutated, cropped and of few families, so plans of others are too modest, or too sure. All scores of
the last attention times one number, and another added to the dustbin's, is what temperature and bias are to a classifier
(Guo, Pleiss, Sun and Weinberger, ICML 2017); they are fitted on families that were not trained on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from .attentions import AttentionProblem
from .homology import calibration_pairs
from .metrics import unmatched
from .model import Aligner
from .pairs import Family, Pair
from .sampler import collate

_BATCH = 8
_FLOOR = 0.01
"""Added to probabilities before the logarithm: alignments to learn from are wrong now and then."""
_SIMPLEX = np.array([[0.0, 0.0], [0.25, 0.0], [0.0, -0.5]])
_EVALUATIONS = 40


def fit_plans(model: Aligner, families: Sequence[Family]) -> None:
    """Set ``model.calibration`` to what makes the right partners of all residues likeliest, over whole domains, the
    flank tests and unrelated pairs of ``families``."""
    pairs, _ = calibration_pairs(families)
    model.calibration.copy_(torch.tensor([1.0, 0.0]))
    training = model.training
    model.eval()
    try:
        problems = _problems(model, sorted(pairs, key=lambda pair: len(pair.query) + len(pair.key)))
    finally:
        model.train(training)

    def loss(at: np.ndarray) -> float:
        with torch.no_grad():
            losses = [_loss(problem.calibrated(float(np.exp(at[0])), float(at[1])).plan(), of) for problem, of in problems]
        return sum(losses) / len(pairs)

    options = {"initial_simplex": _SIMPLEX, "maxfev": _EVALUATIONS, "xatol": 0.01, "fatol": 1e-5}
    found = minimize(loss, _SIMPLEX[0], method="Nelder-Mead", options=options).x
    model.calibration.copy_(torch.tensor([float(np.exp(found[0])), float(found[1])]))


@torch.no_grad()
def _problems(model: Aligner, pairs: Sequence[Pair]) -> list[tuple[AttentionProblem, Sequence[Pair]]]:
    """The last attention of the pairs, a few at a time."""
    parts = [pairs[start : start + _BATCH] for start in range(0, len(pairs), _BATCH)]
    return [(model.solve(collate(part))[-1][0], part) for part in parts]


def _loss(plan: Tensor, pairs: Sequence[Pair]) -> float:
    """Sum over pairs of the mean over residues of minus the log probability of their partner, or the dustbin."""
    total = 0.0
    for of, pair in zip(plan.double(), pairs, strict=True):
        n, m = len(pair.query), len(pair.key)
        lone_rows, lone_columns = unmatched(n, m, pair.target)
        found = of[pair.target[:, 0], pair.target[:, 1]], of[lone_rows, -1], of[-1, lone_columns]
        together, rows, columns = (float((part + _FLOOR).log().sum()) for part in found)
        total -= (2 * together + rows + columns) / (n + m)
    return total
