"""Whether two proteins share anything at all: a calibrated probability of homology.

A logistic function of five numbers that are known of every aligned pair, fitted on families that the aligner was never
trained on: half of the pairs related, in part between flanks, half unrelated. A probability is of that even chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .decode import confidence

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]

FEATURES = ("log odds", "log expected pairs", "mean confidence", "share of the shorter", "log n m")
"""Not the lengths apart: that relatives are often equally long would speak against a part of a long protein."""
SHORTEST = 20
"""Residues. Of two sequences of which one is shorter, which no family has, confidence and shares say nothing that the
odds do not: M beside M is as sure as can be."""
_RIDGE = 1.0
_STEPS = 50


@dataclass(frozen=True)
class Verdict:
    """``bias`` and ``weights``, in the order of ``FEATURES``."""

    bias: float
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        numbers = (self.bias, *self.weights)
        if len(self.weights) != len(FEATURES) or not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"a verdict is a finite bias and {len(FEATURES)} finite weights, got {numbers}")

    def probability(self, log_odds: float, plan: FloatArray, pairs: IntArray) -> float:
        """That the two sequences have a common part, of the pair HMM's log odds, the plan [n+1, m+1] and what was
        decoded of it, [p, 2]. Beside a sequence shorter than ``SHORTEST`` not above the HMM's own."""
        found = float(_sigmoid(self.bias + np.dot(self.weights, features(log_odds, plan, pairs))))
        return min(found, float(_sigmoid(log_odds))) if min(plan.shape) - 1 < SHORTEST else found

    def to_list(self) -> list[float]:
        """Bias and weights, for a file."""
        return [self.bias, *self.weights]

    @classmethod
    def from_list(cls, values: Any) -> Verdict:
        """The inverse of ``to_list``.

        Raises:
            ValueError: it is not a list of so many finite numbers.
        """
        if not (isinstance(values, list) and values and all(type(value) in (int, float) for value in values)):
            raise ValueError("a verdict is a list of numbers")
        return cls(float(values[0]), tuple(map(float, values[1:])))


UNFITTED = Verdict(0.0, (10.0, 0.0, 0.0, 0.0, 0.0))
"""The pair HMM's own odds, of an aligner whose release holds no other."""


def features(log_odds: float, plan: FloatArray, pairs: IntArray) -> FloatArray:
    """The numbers of ``FEATURES``, all about 1 in size; log odds are clipped at 60 nats."""
    n, m = plan.shape[0] - 1, plan.shape[1] - 1
    sure = confidence(plan, pairs)
    expected = float(sure.sum())
    return np.array(
        [
            float(np.clip(log_odds, -20.0, 60.0)) / 10,
            math.log1p(expected) / 5,
            expected / max(len(pairs), 1),
            expected / min(n, m),
            math.log(n * m) / 10,
        ]
    )


def fit(known: Sequence[FloatArray], related: Sequence[bool]) -> Verdict:
    """Logistic regression of ``related`` on the ``features`` of each pair, with a mild ridge; by Newton's method.

    Raises:
        ValueError: fewer than ten pairs of either kind.
    """
    x, y = np.stack(known), np.asarray(related, dtype=np.float64)
    if min(y.sum(), len(y) - y.sum()) < 10:
        raise ValueError(f"a verdict needs ten related and ten unrelated pairs, got {int(y.sum())} of {len(y)} related")
    mean, spread = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-6)
    design = np.concatenate([np.ones((len(x), 1)), (x - mean) / spread], axis=1)
    penalty = np.diag([0.0, *[_RIDGE] * len(FEATURES)])
    weights = np.zeros(design.shape[1])
    for _ in range(_STEPS):
        p = _sigmoid(design @ weights)
        gradient = design.T @ (p - y) + penalty @ weights
        curvature = (design * (p * (1 - p) + 1e-9)[:, None]).T @ design + penalty
        weights = weights - np.linalg.solve(curvature, gradient)
    slopes = weights[1:] / spread
    return Verdict(float(weights[0] - slopes @ mean), tuple(slopes.tolist()))


def _sigmoid(x: Any) -> Any:
    return 0.5 * (1 + np.tanh(0.5 * x))
