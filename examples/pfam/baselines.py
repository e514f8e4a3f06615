"""Alignments that need no learning: the diagonal, the scaled diagonal, Needleman-Wunsch."""

from __future__ import annotations

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


@lru_cache(maxsize=1)
def _aligner() -> PairwiseAligner:
    aligner = PairwiseAligner(mode="global", substitution_matrix=substitution_matrices.load("BLOSUM62"))
    aligner.open_gap_score, aligner.extend_gap_score = -15.0, -1.0
    return aligner


def needleman_wunsch(query: IntArray, key: IntArray) -> IntArray:
    """Global alignment with affine gaps: BLOSUM62, a gap of length k costs 15 + (k - 1); pairs [p, 2].

    One optimum of possibly several, Biopython's first.
    """
    blocks = _aligner().align(decode(query), decode(key))[0].aligned
    spans = [np.stack([np.arange(a, b), np.arange(c, d)], axis=1) for (a, b), (c, d) in zip(*blocks, strict=True)]
    return np.concatenate(spans).astype(np.int64) if spans else np.zeros((0, 2), dtype=np.int64)
