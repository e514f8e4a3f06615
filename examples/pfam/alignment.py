"""A pairwise alignment as columns, with the plan's confidence in each, and what it amounts to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .baselines import blosum62
from .pairs import encode

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]
GAP = -1


@dataclass(frozen=True)
class PairwiseAlignment:
    """Two sequences in columns.

    Attributes:
        letters: of the query [n] and the key [m].
        columns: [c, 2], the residues of each column from 0, one of them ``GAP`` where a residue has no partner. Both
            are in order, and between two pairs the query's unmatched residues stand before the key's.
        confidence: [c] in [0, 1], the plan's entry of the column: of the pair, or of the residue and the dustbin.
    """

    letters: tuple[str, str]
    columns: IntArray
    confidence: FloatArray

    @classmethod
    def from_plan(cls, letters: tuple[str, str], plan: FloatArray, pairs: IntArray) -> PairwiseAlignment:
        """The alignment of decoded ``pairs`` [p, 2] of a plan [n+1, m+1], the dustbin last.

        Raises:
            ValueError: the plan has another shape, or two pairs cross or share a residue.
        """
        n, m = len(letters[0]), len(letters[1])
        if plan.shape != (n + 1, m + 1):
            raise ValueError(f"the plan of {n} and {m} residues is [{n + 1}, {m + 1}], got {list(plan.shape)}")
        if len(pairs) > 1 and np.diff(pairs, axis=0).min() < 1:
            raise ValueError("pairs that cross or share a residue cannot stand in columns; decode by a monotone rule")
        a, b = pairs.T
        array = np.full((n + m - len(pairs), 2), GAP, dtype=np.int64)
        array[a + b - np.arange(len(pairs))] = pairs
        # Before its column stand all residues of its own side that come first, and of the other side: for the query's
        # the partners so far and what is between them, for the key's also what is before the next pair.
        alone = np.setdiff1d(np.arange(n), a, assume_unique=True), np.setdiff1d(np.arange(m), b, assume_unique=True)
        so_far = [np.searchsorted(side, of) for side, of in zip((a, b), alone, strict=True)]
        array[alone[0] + np.append(0, b + 1)[so_far[0]] - so_far[0], 0] = alone[0]
        array[alone[1] + np.append(a, n)[so_far[1]] - so_far[1], 1] = alone[1]
        # A plan that has not converged exceeds 1 a little here and there. GAP, -1, is the dustbin's index.
        return cls(letters, array, np.clip(plan[array[:, 0], array[:, 1]], 0.0, 1.0))

    @cached_property
    def rows(self) -> tuple[str, str]:
        """The two sequences with '-' for gaps, [c] each."""
        query, key = (
            "".join("-" if k == GAP else letters[k] for k in side)
            for letters, side in zip(self.letters, self.columns.T, strict=True)
        )
        return query, key

    @cached_property
    def middle(self) -> str:
        """'|' identical, ':' another pair with a BLOSUM62 score above 0, '.' any other pair, ' ' a gap, [c]."""
        codes = [np.frombuffer(row.encode("ascii"), dtype=np.uint8) for row in self.rows]
        real = (codes[0] != ord("-")) & (codes[1] != ord("-"))
        scores = blosum62()[encode(self.rows[0].replace("-", "X")), encode(self.rows[1].replace("-", "X"))]
        symbols = np.where(scores > 0, ord(":"), ord("."))
        symbols[(codes[0] == codes[1]) & (codes[0] != ord("X"))] = ord("|")
        symbols[~real] = ord(" ")
        return symbols.astype(np.uint8).tobytes().decode("ascii")

    @cached_property
    def digits(self) -> str:
        """The confidence as HMMER writes posterior probabilities: tenths, rounded, 0 to 9, and '*' from 0.95, [c]."""
        tenths = np.floor(self.confidence * 10 + 0.5).astype(int)
        return "".join("*" if tenth == 10 else str(tenth) for tenth in tenths)

    @cached_property
    def paired(self) -> npt.NDArray[np.bool_]:
        """Which columns are pairs, [c]."""
        return (self.columns != GAP).all(axis=1)

    def summary(self) -> Summary:
        """The alignment in figures."""
        confidence = self.confidence[self.paired]
        count = len(confidence)
        residues = len(self.letters[0]) + len(self.letters[1])
        return Summary(
            pairs=count,
            identical=self.middle.count("|"),
            similar=self.middle.count("|") + self.middle.count(":"),
            mean_confidence=float(confidence.mean()) if count else 0.0,
            expected_accuracy=float((confidence.sum() + self.confidence.sum()) / residues),
            doubtful=int((confidence < 0.5).sum()),
        )


@dataclass(frozen=True)
class Summary:
    """An alignment in figures; the expectations hold as far as plan entries are probabilities.

    Attributes:
        pairs: aligned residue pairs.
        identical: pairs of one letter.
        similar: these, and pairs with a BLOSUM62 score above 0.
        mean_confidence: mean P_ij of the pairs, which is their expected precision; 0 without pairs.
        expected_accuracy: expected fraction of all n + m residues that were given their right partner, or rightly none;
            the alignment metric accuracy of Schwartz, Myers and Batzoglou, arXiv:q-bio/0510052.
        doubtful: pairs with P_ij below 1/2.
    """

    pairs: int
    identical: int
    similar: int
    mean_confidence: float
    expected_accuracy: float
    doubtful: int
