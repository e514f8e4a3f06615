"""From a plan to residue pairs: named rules, and how far to trust each pair.

Three of the rules find the best alignment whose pairs do not cross. All are the same dynamic programming, over
different gains per pair; it is compiled by Numba and cached beside this file, or in the user's cache where that is
read-only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .loops import loop
from .metrics import LOG_FLOOR

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]

THRESHOLD = 0.2
"""What ``expected_accuracy`` takes off every pair by default: lower finds more pairs, and more wrong ones."""
MODESTY, LEAST = 0.9, 0.15
"""What ``expected_f1`` makes of an expected F1, and the lowest threshold it takes."""
_ROUNDS = 4


def mutual_argmax(plan: FloatArray) -> IntArray:
    """Pairs [p, 2] that are each other's best entry, the dustbin included among the candidates.

    ``plan`` is [n+1, m+1]. Nothing makes these pairs monotone: a pair may cross another.
    """
    best_key = plan[:-1].argmax(axis=1)
    best_query = plan[:, :-1].argmax(axis=0)
    i = np.flatnonzero(best_key < plan.shape[1] - 1)
    i = i[best_query[best_key[i]] == i]
    return np.stack([i, best_key[i]], axis=1)


def expected_accuracy(plan: FloatArray, threshold: float = THRESHOLD) -> IntArray:
    """The monotone alignment [p, 2] that maximises the sum of P_ij - threshold over its pairs.

    Maximum expected accuracy, Holmes and Durbin, J. Comput. Biol. 5 (1998) 493: the entries of ``plan`` [n+1, m+1] are
    taken for posterior match probabilities, and gaps are free.
    """
    return best_monotone(plan[:-1, :-1] - np.float64(threshold))


def expected_f1(plan: FloatArray) -> IntArray:
    """The monotone alignment [p, 2] of about the largest expected F1, completed at its ends.

    F1 is expected to be 2 sum P / (p + the true pairs), the true ones as many as the plan [n+1, m+1] pairs, and a pair
    raises it where P is above half of it. So the threshold of ``expected_accuracy`` is half of what the alignment
    expects of itself (Dinkelbach, Management Science 13 (1967) 492): high where partners are plain, low where they are
    not. It is ``MODESTY`` times that, for plans say less than is true, and at least ``LEAST``, as it is beyond the
    outermost pairs: at their ends plans are least sure, and what is left out there has no place at all.
    """
    real = plan[:-1, :-1].astype(np.float64)
    mass, threshold = float(real.sum()), THRESHOLD
    for _ in range(_ROUNDS):
        pairs = best_monotone(real - threshold)
        expected = 2 * float(real[pairs[:, 0], pairs[:, 1]].sum()) / max(len(pairs) + mass, LOG_FLOOR)
        threshold = max(MODESTY * expected / 2, LEAST)
    pairs = best_monotone(real - threshold)
    if len(pairs) == 0:
        return pairs
    (i, j), (k, l) = pairs[0], pairs[-1] + 1
    before, after = best_monotone(real[:i, :j] - LEAST), best_monotone(real[k:, l:] - LEAST)
    return np.concatenate([before, pairs, after + pairs[-1] + 1])


def most_probable(plan: FloatArray) -> IntArray:
    """The monotone alignment [p, 2] of the largest log plan, summed over its pairs and over what it leaves unmatched.

    Log P_ij is summed over pairs, log P_i,dustbin over unmatched queries, log P_dustbin,j over unmatched keys. Less the
    same sum of the empty alignment, a pair gains log P_ij - log P_i,dustbin - log P_dustbin,j, and gaps are
    free. ``plan`` is [n+1, m+1]; logarithms are of max(P, LOG_FLOOR).
    """
    log_plan = np.log(np.maximum(plan, LOG_FLOOR, dtype=np.float64))
    return best_monotone(log_plan[:-1, :-1] - log_plan[:-1, -1:] - log_plan[-1:, :-1])


def best_monotone(gain: FloatArray) -> IntArray:
    """The pairs [p, 2], increasing in both columns, with the largest sum of ``gain`` [n, m]; gaps cost nothing.

        F_ij = max(F_(i-1)j, F_i(j-1), F_(i-1)(j-1) + gain_ij)

    A pair is made only where it is better than both gaps, so a gain of zero or less never makes one. Time n m, and a
    byte per entry beside ``gain``.
    """
    return _best_monotone(np.ascontiguousarray(gain, dtype=np.float64))


def confidence(plan: FloatArray, pairs: IntArray) -> FloatArray:
    """How sure the plan [n+1, m+1] is of each decoded pair [p, 2]: its entry P_ij, [p]."""
    return plan[pairs[:, 0], pairs[:, 1]]


Decoder = Callable[[FloatArray], IntArray]

DECODERS: dict[str, Decoder] = {
    "f1": expected_f1,
    "monotone": most_probable,
    "accuracy": expected_accuracy,
    "mutual": mutual_argmax,
}
"""The rules by name: a plan [n+1, m+1], the dustbin last, to residue pairs [p, 2]."""
DEFAULT_DECODER = "f1"


@loop()
def _best_monotone(gain: FloatArray) -> IntArray:
    n, m = gain.shape
    came_from = np.zeros((n, m), dtype=np.uint8)  # 0: row above, 1: column before, 2: a pair
    best = np.zeros(m + 1)
    for i in range(n):
        diagonal = best[0]
        for j in range(m):
            above = best[j + 1]
            value = above
            if best[j] > value:
                value = best[j]
                came_from[i, j] = 1
            if diagonal + gain[i, j] > value:
                value = diagonal + gain[i, j]
                came_from[i, j] = 2
            diagonal = above
            best[j + 1] = value
    pairs = np.empty((min(n, m), 2), dtype=np.int64)
    count = min(n, m)
    i, j = n - 1, m - 1
    while i >= 0 and j >= 0:
        step = came_from[i, j]
        if step == 2:
            count -= 1
            pairs[count, 0], pairs[count, 1] = i, j
        if step != 1:
            i -= 1
        if step != 0:
            j -= 1
    return pairs[count:]
