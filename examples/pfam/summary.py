"""From results of single pairs to what is reported: macro and micro, by identity, with intervals over families."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import bootstrap

from .evaluate import Result, Scores
from .metrics import PairScore

FloatArray = npt.NDArray[np.floating]

LEVEL = 0.95
RESAMPLES = 10_000
BINS = {"identity <= 0.2": (-np.inf, 0.2), "0.2 - 0.4": (0.2, 0.4), "0.4 - 0.9": (0.4, 0.9), "> 0.9": (0.9, np.inf)}
"""Identities by name, above the first number and up to the second: the twilight zone first."""
LOWEST = next(iter(BINS))


class Interval(NamedTuple):
    """A mean over families and its 95 % bootstrap interval; NaN ends where fewer than two families have a value."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """One aligner on some pairs: macro over families, each with its interval, and micro, the counts of all pairs."""

    pairs: int
    families: int
    macro: dict[str, Interval]
    micro: PairScore


def summarise(results: Sequence[Result], seed: int = 0) -> Summary:
    """Everything measured, over all of ``results``."""
    families = Scores.of(results).families
    micro = sum((result.counts for result in results), PairScore(0, 0, 0))
    return Summary(len(results), len(families), _intervals(families, seed), micro)


def by_identity(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results in each of ``BINS``, empty ones included; a bin's macro means are over the families it holds."""
    return {name: [result for result in results if low < result.identity <= high] for name, (low, high) in BINS.items()}


def differences(first: Sequence[Result], second: Sequence[Result], seed: int = 0) -> dict[str, Interval]:
    """Macro means of ``first`` less those of ``second``, of what both measure, with paired intervals over families.

    Raises:
        ValueError: the two are not of the same pairs.
    """
    if sorted((r.number, r.family, r.names) for r in first) != sorted((r.number, r.family, r.names) for r in second):
        raise ValueError("a paired difference needs two aligners' results on the same pairs; align the same ones")
    a, b = Scores.of(first).families, Scores.of(second).families
    return _intervals(
        {family: {name: a[family][name] - b[family][name] for name in a[family] if name in b[family]} for family in a},
        seed,
    )


def _intervals(families: dict[str, dict[str, float]], seed: int) -> dict[str, Interval]:
    names = list(next(iter(families.values()), {}))
    values = np.array([[means[name] for name in names] for means in families.values()])
    return {name: Interval(*row) for name, row in zip(names, mean_interval(values, seed).tolist())} if names else {}


def mean_interval(values: FloatArray, seed: int = 0) -> FloatArray:
    """[families, k] values to [k, 3]: mean, and the ends of its percentile bootstrap interval over families.

    Families are drawn with replacement ``RESAMPLES`` times; their pairs stay together, for they are not independent.
    Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    mean = values.mean(axis=0)
    if len(values) < 2:
        return np.stack([mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)], axis=1)
    found = bootstrap(
        (values,), np.mean, axis=0, confidence_level=LEVEL, n_resamples=RESAMPLES, method="percentile", rng=seed
    ).confidence_interval
    return np.stack([mean, found.low, found.high], axis=1)
