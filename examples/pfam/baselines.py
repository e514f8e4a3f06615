"""Alignments that need no learning: the diagonal, the scaled diagonal, Needleman-Wunsch, Smith-Waterman."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from Bio.Align import PairwiseAligner, substitution_matrices

from .pairs import ALPHABET, decode

IntArray = npt.NDArray[np.int64]


def diagonal(n: int, m: int) -> IntArray:
    """Residue i with residue i, [min(n, m), 2]."""
    i = np.arange(min(n, m))
    return np.stack([i, i], axis=1)


def scaled_diagonal(n: int, m: int) -> IntArray:
    """Token centres aligned, j nearest to (i + 1/2) m/n - 1/2, one to one: the longer side skips residues."""
    if n <= m:
        i = np.arange(n)
        return np.stack([i, ((2 * i + 1) * m) // (2 * n)], axis=1)
    return scaled_diagonal(m, n)[:, ::-1].copy()


@lru_cache(maxsize=1)
def blosum62() -> npt.NDArray[np.float64]:
    """BLOSUM62 in half bits, [21, 21] in the order of ``pairs.ALPHABET``, from Biopython's copy of the NCBI file."""
    table = substitution_matrices.load("BLOSUM62")
    return np.array([[float(table[a, b]) for b in ALPHABET] for a in ALPHABET])


HALF_BIT = math.log(2) / 2
"""BLOSUM62's unit, in nats."""
GLOBAL_GAP, LOCAL_GAP = (15.0, 1.0), (11.0, 0.5)
"""Cost of a gap's first and of each further residue. The local one is the best of ``gap_grid`` on training families."""


def needleman_wunsch(query: IntArray, key: IntArray, gap: tuple[float, float] = GLOBAL_GAP) -> IntArray:
    """Global alignment with affine gaps: BLOSUM62, a gap of length k costs gap[0] + (k - 1) gap[1]; pairs [p, 2].

    Gaps at the ends cost the same: free ones are worse on full-length domains. One optimum of possibly several,
    Biopython's first.
    """
    return _align("global", query, key, gap)


def smith_waterman(query: IntArray, key: IntArray, gap: tuple[float, float] = LOCAL_GAP) -> IntArray:
    """Local alignment, likewise: pairs [p, 2] of the stretch that scores most."""
    return _align("local", query, key, gap)


@lru_cache
def _aligner(mode: str, gap: tuple[float, float]) -> PairwiseAligner:
    aligner = PairwiseAligner(mode=mode, substitution_matrix=substitution_matrices.load("BLOSUM62"))
    aligner.open_gap_score, aligner.extend_gap_score = -gap[0], -gap[1]
    return aligner


def _align(mode: str, query: IntArray, key: IntArray, gap: tuple[float, float]) -> IntArray:
    found = next(iter(_aligner(mode, gap).align(decode(query), decode(key))), None)  # none: nothing scores above 0
    blocks = zip(*found.aligned, strict=True) if found else ()
    spans = [np.stack([np.arange(a, b), np.arange(c, d)], axis=1) for (a, b), (c, d) in blocks]
    return np.concatenate(spans).astype(np.int64) if spans else np.zeros((0, 2), dtype=np.int64)
