"""Random changes to training pairs: point mutations drawn from BLOSUM62, insertions and deletions.

A handful of families is little to learn from, and their conserved positions are easily memorised. Mutating both
sequences moves a close pair towards the twilight zone while its target alignment stays known.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from .baselines import blosum62
from .pairs import IntArray, Pair

# Robinson & Robinson, PNAS 88 (1991) 8880: the residue frequencies NCBI pairs with BLOSUM62, in ALPHABET's order.
BACKGROUND = np.array(
    [0.0780, 0.0512, 0.0448, 0.0536, 0.0192, 0.0426, 0.0629, 0.0738, 0.0219, 0.0514,
     0.0901, 0.0574, 0.0224, 0.0385, 0.0520, 0.0711, 0.0584, 0.0132, 0.0321, 0.0644]
)  # fmt: skip

_GAP_EXPONENT = 1.7


@lru_cache(maxsize=1)
def substitution_cdf() -> npt.NDArray[np.float64]:
    """Cumulative P(b | a) over residues b, [20, 20]: P(b | a) is proportional to f_b 2^(s_ab / 2), s in half bits."""
    joint = BACKGROUND[None, :] * 2.0 ** (blosum62()[:20, :20] / 2)
    return np.cumsum(joint / joint.sum(axis=1, keepdims=True), axis=1)


def mutate(residues: IntArray, rate: float, rng: np.random.Generator) -> IntArray:
    """Each known residue is redrawn from P(. | residue) with probability ``rate`` (it may come back unchanged)."""
    drawn = (rng.random(len(residues)) < rate) & (residues < 20)
    fresh = (rng.random(len(residues))[:, None] > substitution_cdf()[np.minimum(residues, 19)]).sum(axis=1)
    return np.where(drawn, np.minimum(fresh, 19), residues).astype(np.int64)


def insert_and_delete(pair: Pair, per_hundred: float, rng: np.random.Generator) -> Pair:
    """Poisson many runs per hundred residues are deleted from, or inserted into, either side.

    Run lengths k have probabilities in proportion to k^-1.7, up to the side's length (a third of it for
    deletions): most are short (Benner, Cohen and Gonnet, J. Mol. Biol. 229 (1993) 1065). Inserted residues
    have no partner, nor have the partners of deleted ones.
    """
    sides = [pair.query, pair.key]
    labels: list[np.ndarray] = []
    for side, residues in enumerate(sides):
        label = np.full(len(residues), -1, dtype=np.int64)
        label[pair.target[:, side]] = np.arange(len(pair.target))
        labels.append(label)
    for side in (0, 1):
        for _ in range(rng.poisson(per_hundred * len(sides[side]) / 100)):
            n = len(sides[side])
            at, run, deleted = int(rng.integers(n)), int(rng.zipf(_GAP_EXPONENT)), rng.random() < 0.5
            run = min(run, max(n // 3, 1) if deleted else n)
            if deleted and n - run >= 8:
                sides[side] = np.delete(sides[side], slice(at, at + run))
                labels[side] = np.delete(labels[side], slice(at, at + run))
            else:
                fresh = rng.choice(20, size=run, p=BACKGROUND / BACKGROUND.sum())
                sides[side] = np.insert(sides[side], at, fresh)
                labels[side] = np.insert(labels[side], at, np.full(run, -1))
    _, i, j = np.intersect1d(labels[0][labels[0] >= 0], labels[1][labels[1] >= 0], return_indices=True)
    target = np.stack([np.flatnonzero(labels[0] >= 0)[i], np.flatnonzero(labels[1] >= 0)[j]], axis=1)
    return replace(pair, query=sides[0], key=sides[1], target=target.astype(np.int64))
