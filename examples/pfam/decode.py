"""From a plan to residue pairs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]


def mutual_argmax(plan: FloatArray) -> IntArray:
    """Pairs [p, 2] that are each other's best entry, the dustbin included among the candidates.

    ``plan`` is [n+1, m+1]. Nothing makes these pairs monotone: a pair may cross another.
    """
    best_key = plan[:-1].argmax(axis=1)
    best_query = plan[:, :-1].argmax(axis=0)
    i = np.flatnonzero(best_key < plan.shape[1] - 1)
    i = i[best_query[best_key[i]] == i]
    return np.stack([i, best_key[i]], axis=1)


def expected_accuracy(plan: FloatArray, threshold: float = 0.1) -> IntArray:
    """The monotone alignment [p, 2] that maximises the sum of P_ij - threshold over its pairs.

    Maximum expected accuracy, Holmes and Durbin, J. Comput. Biol. 5 (1998) 493: dynamic programming on the plan as if
    its entries were posterior match probabilities. Gaps are free, so a row of the recursion

        F_ij = max(F_(i-1)j, F_i(j-1), F_(i-1)(j-1) + P_ij - threshold)

    is a running maximum, and only the n rows are a Python loop.
    """
    gain = plan[:-1, :-1].astype(np.float64) - threshold
    n, m = gain.shape
    best = np.zeros((n + 1, m + 1))
    for i in range(n):
        best[i + 1, 1:] = np.maximum.accumulate(np.maximum(best[i, 1:], best[i, :-1] + gain[i]))
    pairs = []
    i, j = n, m
    while i and j:
        if best[i, j] == best[i - 1, j]:
            i -= 1
        elif best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((i, j))
    return np.array(pairs[::-1], dtype=np.int64).reshape(-1, 2)
