"""What is measured: aligned residue pairs (precision, recall, F1) and the plan itself against the target alignment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .pairs import ALPHABET

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]

LOG_FLOOR = 1e-30
"""Plan entries underflow to 0 in float32; logarithms are taken of max(P, LOG_FLOOR), here and in the loss."""


@dataclass(frozen=True)
class PairScore:
    """Predicted residue pairs against the curated ones: how many are right, how many predicted, how many curated."""

    hits: int
    predicted: int
    target: int

    @property
    def precision(self) -> float:
        """hits / predicted, 0 for an empty prediction."""
        return self.hits / max(self.predicted, 1)

    @property
    def recall(self) -> float:
        """hits / target."""
        return self.hits / max(self.target, 1)

    @property
    def f1(self) -> float:
        """Harmonic mean of the two, 2 hits / (predicted + target)."""
        return 2 * self.hits / max(self.predicted + self.target, 1)

    def __add__(self, other: PairScore) -> PairScore:
        """Counts added up: scores of the sum are micro averages."""
        return PairScore(self.hits + other.hits, self.predicted + other.predicted, self.target + other.target)


def pair_score(predicted: IntArray, target: IntArray) -> PairScore:
    """Compare predicted pairs [p, 2] with target pairs [k, 2]."""
    if len(predicted) == 0 or len(target) == 0:
        return PairScore(0, len(predicted), len(target))
    width = int(max(predicted[:, 1].max(), target[:, 1].max())) + 1
    hits = len(np.intersect1d(predicted @ [width, 1], target @ [width, 1]))
    return PairScore(hits, len(predicted), len(target))


def sequence_identity(query: IntArray, key: IntArray, target: IntArray) -> float:
    """Identical residues over aligned ones, both of the reference alignment ``target`` [k, 2]; unknown X never matches.

    Columns with a gap or a lower-case residue count on neither side of the fraction.
    """
    a, b = query[target[:, 0]], key[target[:, 1]]
    return float(np.mean((a == b) & (a != ALPHABET.index("X")))) if len(target) else 0.0


def partners(pairs: IntArray, n: int, m: int) -> tuple[IntArray, IntArray]:
    """An alignment [p, 2] as the key of each query [n], or m for the dustbin, and the query of each key [m], or n."""
    on_key, on_query = np.full(n, m), np.full(m, n)
    on_key[pairs[:, 0]], on_query[pairs[:, 1]] = pairs[:, 1], pairs[:, 0]
    return on_key, on_query


def row_accuracy(found: tuple[IntArray, IntArray], target: IntArray) -> float:
    """Share of all n + m residues whose partner, or the dustbin, is the one of ``target`` [k, 2].

    ``found`` is what ``partners`` gives of a hard alignment, or ``best_partners`` of a plan.
    """
    on_key, on_query = partners(target, len(found[0]), len(found[1]))
    right = np.count_nonzero(found[0] == on_key) + np.count_nonzero(found[1] == on_query)
    return float(right / (len(on_key) + len(on_query)))


def best_partners(plan: FloatArray) -> tuple[IntArray, IntArray]:
    """The largest entry of each row [n] and of each column [m] of a plan [n+1, m+1], the dustbin included."""
    return plan[:-1].argmax(axis=1), plan[:, :-1].argmax(axis=0)


def reconstruction(plan: FloatArray, target: IntArray) -> float:
    """Mean negative log plan over every residue's target: its partner, or the dustbin (SuperGlue's objective).

    ``plan`` is [n+1, m+1] with the dustbin last; ``target`` is [k, 2]. A matched pair stands for two residues, so it
    counts twice: the mean runs over all n + m residues. Sarlin et al., SuperGlue, arXiv:1911.11763, equation 10.
    """
    n, m = plan.shape[0] - 1, plan.shape[1] - 1
    log_plan = np.log(np.maximum(plan, LOG_FLOOR))
    rows, cols = unmatched(n, m, target)
    total = 2 * log_plan[target[:, 0], target[:, 1]].sum() + log_plan[rows, m].sum() + log_plan[n, cols].sum()
    return float(-total / (n + m))


def sparse_cross_entropy(plan: FloatArray, target: IntArray) -> float:
    """Mean over matched query residues of -log(P_ij / sum_j P_ij), j over real keys: where, given that it aligns."""
    real = np.maximum(plan[:-1, :-1], 0.0)
    rows = real[target[:, 0]]
    picked = np.maximum(rows[np.arange(len(target)), target[:, 1]], LOG_FLOOR)
    return float(np.mean(np.log(np.maximum(rows.sum(axis=1), LOG_FLOOR)) - np.log(picked)))


def plan_barycentre(plan: FloatArray) -> FloatArray:
    """Where each query residue lands on the key sequence, sum_j P_ij j / sum_j P_ij, [n], in residues."""
    real = plan[:-1, :-1].astype(np.float64)
    return (real @ np.arange(real.shape[1])) / np.maximum(real.sum(axis=1), LOG_FLOOR)


def hard_barycentre(predicted: IntArray, n: int, m: int) -> FloatArray:
    """The same for a hard alignment [p, 2]: its partner where it has one, straight lines between partners elsewhere.

    Without this an unaligned residue would have no position at all, and a baseline could not be scored on it.
    """
    if len(predicted) == 0:
        return np.full(n, (m - 1) / 2)
    return np.interp(np.arange(n), predicted[:, 0], predicted[:, 1])


def barycentre_error(barycentre: FloatArray, target: IntArray) -> float:
    """Mean |barycentre_i - j| over the target pairs (i, j), in residues."""
    return float(np.mean(np.abs(barycentre[target[:, 0]] - target[:, 1])))


def unmatched(n: int, m: int, target: IntArray) -> tuple[IntArray, IntArray]:
    """Query and key residues without a partner."""
    rows = np.setdiff1d(np.arange(n), target[:, 0], assume_unique=True)
    return rows, np.setdiff1d(np.arange(m), target[:, 1], assume_unique=True)


def macro(rows: Iterable[tuple[str, Mapping[str, float]]]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Mean over each family's pairs, then over families: (macro means, per-family means)."""
    grouped: dict[str, list[Mapping[str, float]]] = {}
    for family, values in rows:
        grouped.setdefault(family, []).append(values)
    families = {
        family: {name: float(np.mean([v[name] for v in values])) for name in values[0]}
        for family, values in grouped.items()
    }
    names = next(iter(families.values()), {})
    return {name: float(np.mean([f[name] for f in families.values()])) for name in names}, families
