"""When to trust an alignment: plan entries as probabilities, and what a pair's certificates say of its errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import bootstrap, spearmanr

from torch_sinkhorn_attn import certify

from .attentions import AttentionProblem
from .decode import confidence
from .evaluate import Result
from .metrics import unmatched
from .model import Aligner
from .pairs import Pair
from .sampler import collate
from .summary import LEVEL, Interval

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]

FLOOR = 0.01
"""Plan entries below it are left out: nearly all of a plan is, and rightly, near 0 and would drown the rest."""


@dataclass
class Reliability:
    """Probabilities against what came true, in ``bins`` equal bins of [0, 1]; what is added is only counted.

    Attributes:
        count: probabilities in each bin, [bins].
        predicted: their sum, [bins].
        true: how many of them came true, [bins].
        squared: sum of (probability - outcome)^2 over all of them.
    """

    bins: int = 10
    count: FloatArray = field(init=False)
    predicted: FloatArray = field(init=False)
    true: FloatArray = field(init=False)
    squared: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.count, self.predicted, self.true = np.zeros((3, self.bins))

    def add(self, probability: FloatArray, outcome: npt.NDArray[np.bool_]) -> None:
        """Count probabilities [k], of which rounding may have left some a little above 1, and their outcomes [k]."""
        at = np.minimum((probability * self.bins).astype(np.int64), self.bins - 1)
        self.count += np.bincount(at, minlength=self.bins)
        self.predicted += np.bincount(at, probability, minlength=self.bins)
        self.true += np.bincount(at, outcome, minlength=self.bins)
        self.squared += float(np.square(probability - outcome).sum())

    @property
    def curve(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Of the bins that hold something: mean probability, frequency, count."""
        held = self.count > 0
        return self.predicted[held] / self.count[held], self.true[held] / self.count[held], self.count[held]

    @property
    def calibration_error(self) -> float:
        """Expected calibration error, the mean over all counted of their bin's |mean probability - frequency|.

        Naeini, Cooper and Hauskrecht, AAAI 2015. 0 with nothing counted.
        """
        return float(np.abs(self.predicted - self.true).sum() / max(self.count.sum(), 1.0))

    @property
    def brier(self) -> float:
        """Mean squared distance of probability and outcome, 0 or 1. Brier, Monthly Weather Review 78 (1950) 1."""
        return float(self.squared / max(self.count.sum(), 1.0))


@dataclass(frozen=True)
class Calibration:
    """Plan entries of at least ``FLOOR`` as match probabilities, and the confidence shown for each decoded pair and for
    each residue, of both sides, that the decoded alignment leaves without a partner."""

    entries: Reliability = field(default_factory=Reliability)
    decoded: Reliability = field(default_factory=Reliability)
    unpaired: Reliability = field(default_factory=Reliability)

    @property
    def parts(self) -> dict[str, Reliability]:
        """What is counted, by its name."""
        names = (f"plan entries >= {FLOOR:g}", "decoded pairs", "residues left unpaired")
        return dict(zip(names, (self.entries, self.decoded, self.unpaired), strict=True))

    def add(self, pair: Pair, plan: FloatArray, predicted: IntArray) -> None:
        """Count the plan [n+1, m+1] of a pair and the pairs [p, 2] decoded from it."""
        real = plan[:-1, :-1]
        aligned = np.zeros(real.shape, dtype=np.bool_)
        aligned[pair.target[:, 0], pair.target[:, 1]] = True
        kept = real >= FLOOR
        self.entries.add(real[kept], aligned[kept])
        self.decoded.add(confidence(plan, predicted), aligned[predicted[:, 0], predicted[:, 1]])
        n, m = real.shape
        left, lone = unmatched(n, m, predicted), unmatched(n, m, pair.target)
        for in_bin, mine, theirs in zip((plan[:-1, -1], plan[-1, :-1]), left, lone, strict=True):
            self.unpaired.add(in_bin[mine], np.isin(mine, theirs))


def solved_attentions(model: Aligner, pairs: Sequence[Pair]) -> list[AttentionProblem]:
    """The attentions of the pairs in order, as the model solves them in evaluation; the model's mode is kept."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return [problem for problem, _ in model.solve(collate(pairs))]
    finally:
        model.train(training)


def certificates(model: Aligner, pair: Pair) -> dict[str, float]:
    """What ``certify`` says of the attention that aligns a pair; larger should mean less to be trusted.

    The residual is the largest of a real column or the dustbin's, per residue of mass; the bias is relative to the
    implicit gradient's norm; the certified bound of the bias, likewise, is infinite where there is none.
    """
    problem = solved_attentions(model, [pair])[-1]
    found = certify(problem.query, problem.key, problem.attn_mask, **problem.options)
    return {
        "column residual": float(found.col_residual_max) / (len(pair.query) + len(pair.key)),
        "a-posteriori rate": float(found.rate),
        "measured surrogate bias": float(found.relative_bias),
        "bound of the surrogate bias": float(found.bias_bound / found.implicit_norm),
    }


@dataclass(frozen=True)
class Predictor:
    """How well a number known without the answer orders pairs by their error, 1 - F1.

    Attributes:
        finite: pairs for which the number is finite, of ``pairs``; the rest is of these.
        spearman: rank correlation with the error over pairs, with a bootstrap interval over families; NaN if constant.
        f1: mean F1 of the quarter of the pairs it trusts most, and of the quarter it trusts least.
    """

    pairs: int
    finite: int
    spearman: Interval
    f1: tuple[float, float]

    @property
    def verdict(self) -> str:
        """In words, by where the interval lies."""
        if self.spearman.low > 0:
            return "foretells errors"
        return "points the wrong way" if self.spearman.high < 0 else "tells nothing"


def predictor(results: Sequence[Result], doubt: Sequence[float], seed: int = 0) -> Predictor:
    """Judge ``doubt``, a number per result that should grow with its error."""
    numbers, f1 = np.asarray(doubt, dtype=np.float64), np.array([result.values["f1"] for result in results])
    finite = np.isfinite(numbers)
    families = np.unique([result.family for result in results], return_inverse=True)[1][finite]
    numbers, f1 = numbers[finite], f1[finite]
    quarter = max(len(f1) // 4, 1)
    order = f1[np.argsort(numbers, kind="stable")]
    trusted = (float(order[:quarter].mean()), float(order[-quarter:].mean())) if len(f1) else (np.nan, np.nan)
    return Predictor(len(finite), len(f1), _spearman_interval(numbers, 1.0 - f1, families, seed), trusted)


def _spearman_interval(x: FloatArray, y: FloatArray, families: IntArray, seed: int) -> Interval:
    members = [np.flatnonzero(families == family) for family in np.unique(families)]

    def correlation(drawn: IntArray) -> float:
        at = np.concatenate([members[family] for family in drawn])
        constant = np.ptp(x[at]) == 0 or np.ptp(y[at]) == 0
        return np.nan if constant else float(spearmanr(x[at], y[at]).statistic)

    if len(members) < 2:
        return Interval(correlation(np.arange(len(members))) if members else np.nan, np.nan, np.nan)
    statistic: Callable[[IntArray], float] = correlation
    every = np.arange(len(members))
    found = bootstrap(
        (every,), statistic, vectorized=False, confidence_level=LEVEL, n_resamples=500, method="percentile", rng=seed
    ).confidence_interval
    return Interval(correlation(every), float(found.low), float(found.high))
