"""From families to training and evaluation pairs: residues, and the target pairs (i, j) of the curated alignment.

Two residues are a target pair when they stand in the same column and both are upper case (Pfam writes match columns in
upper case and inserts in lower case). Every other residue is unmatched: its target is the dustbin.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .identity import labels
from .stockholm import GAPS, STOP, Alignment

IntArray = npt.NDArray[np.int64]

ALPHABET = "ARNDCQEGHILKMFPSTWYVX"
"""The twenty residues in BLOSUM62's order, then X for anything unknown."""

# Rare letters stand for the residue they are closest to: selenocysteine, pyrrolysine and the three ambiguity codes.
_SUBSTITUTES = {"U": "C", "O": "K", "B": "D", "Z": "E", "J": "L"}
_FEW = 10_000_000
"""Pairs of a family that are listed to draw from them; of more, numbers are drawn."""
_CODE = np.full(128, ALPHABET.index("X"), dtype=np.int64)
for _letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ":
    _CODE[ord(_letter)] = ALPHABET.find(_SUBSTITUTES.get(_letter, _letter)) % len(ALPHABET)

_CODE_OF_EITHER = _CODE[[*range(96), *range(64, 96)]].astype(np.int8)  # lower case as upper case
_IS_RESIDUE = np.array([chr(code) not in GAPS + STOP for code in range(128)])

# The letters of nucleic acids, and IUPAC's for several of them, as residue codes; U has C's.
_NUCLEOTIDES = [ALPHABET.index(letter) for letter in "ACGTN"]
_AMBIGUOUS = [ALPHABET.index(letter) for letter in "RYKMSWDHV"]
_FEWEST_LETTERS = 10  # fewer of nothing but ACGTUN may well be a peptide
_RARELY_AMBIGUOUS = 0.1


@dataclass(frozen=True)
class Chain:
    """One row of a family without its gaps: residue codes [n], their alignment columns [n], upper case or not [n].

    Six bytes a residue, so that all of Pfam-A.seed fits in the memory of a laptop.
    """

    name: str
    residues: npt.NDArray[np.int8]
    columns: npt.NDArray[np.int32]
    matched: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.residues)


@dataclass(frozen=True)
class Family:
    """A record's sequences; ``key`` is its name with the accession, ``nucleotides`` whether they look like such.

    Several records may be of one family: see ``identity``.
    """

    name: str
    accession: str
    sequences: Sequence[Chain]
    nucleotides: bool = False

    @property
    def key(self) -> str:
        return f"{self.name} ({self.accession})" if self.accession else self.name


@dataclass(frozen=True)
class Pair:
    """Query residues [n], key residues [m] and the target pairs [k, 2], strictly increasing in both columns.

    ``number`` tells those that are compared with each other apart; names may repeat.
    """

    family: str
    names: tuple[str, str]
    query: IntArray
    key: IntArray
    target: IntArray
    number: int = 0


def encode(letters: str) -> IntArray:
    """Residue codes [n] of a string of letters, case ignored."""
    return _CODE[np.frombuffer(letters.upper().encode("ascii"), dtype=np.uint8)]


def decode(residues: IntArray) -> str:
    """The letters of residue codes [n]."""
    return "".join(ALPHABET[code] for code in residues)


def looks_like_nucleotides(counts: npt.NDArray[np.integer]) -> bool:
    """Whether residues, ``counts`` [21] of each code, are more likely a nucleic acid: ten or more of A, C, G, T, U, N,
    and nothing else but a few of IUPAC's ambiguity codes."""
    total, plain = counts.sum(), counts[_NUCLEOTIDES].sum()
    known = plain + counts[_AMBIGUOUS].sum()
    return bool(known == total >= _FEWEST_LETTERS and total - plain <= _RARELY_AMBIGUOUS * total)


def residue_counts(residues: npt.NDArray[np.integer]) -> IntArray:
    """How often each code occurs, [21]."""
    return np.bincount(residues, minlength=len(ALPHABET))


def family_from_alignment(alignment: Alignment) -> Family:
    """Drop the gaps of every row, remembering columns and case; rows without residues are left out."""
    sequences, counts = [], np.zeros(len(ALPHABET), dtype=np.int64)
    for name, row in zip(alignment.names, alignment.rows, strict=True):
        letters = np.frombuffer(row.encode("ascii"), dtype=np.uint8)
        columns = np.flatnonzero(_IS_RESIDUE[letters])
        if len(columns):
            kept = letters[columns]
            codes = _CODE_OF_EITHER[kept]
            counts += residue_counts(codes)
            sequences.append(Chain(name, codes, columns.astype(np.int32), kept <= ord("Z")))
    return Family(alignment.name, alignment.accession, tuple(sequences), looks_like_nucleotides(counts))


def load_families(alignments: Iterable[Alignment]) -> list[Family]:
    """The families with at least two sequences; the rest cannot make a pair."""
    families = [family_from_alignment(alignment) for alignment in alignments]
    return [family for family in families if len(family.sequences) > 1]


def make_pair(family: Family, first: int, second: int) -> Pair:
    """The pair of two sequences of a family, uncropped."""
    return _pair(family, family.key, first, second)


def _pair(family: Family, label: str, first: int, second: int, number: int = 0) -> Pair:
    a, b = family.sequences[first], family.sequences[second]
    return Pair(
        label, (a.name, b.name), a.residues.astype(np.int64), b.residues.astype(np.int64), _targets(a, b), number
    )


def _targets(a: Chain, b: Chain) -> IntArray:
    i, j = np.flatnonzero(a.matched), np.flatnonzero(b.matched)
    _, in_a, in_b = np.intersect1d(a.columns[i], b.columns[j], assume_unique=True, return_indices=True)
    return np.stack([i[in_a], j[in_b]], axis=1).astype(np.int64)


def crop_pair(pair: Pair, cap: int, rng: np.random.Generator) -> Pair:
    """Random windows of at most ``cap`` residues around a common target pair, so that the crops still overlap.

    The two windows are drawn independently around the same anchor: their ends do not align, which is what keeps a
    model from learning "the diagonal" off the crops.
    """
    if max(len(pair.query), len(pair.key)) <= cap or len(pair.target) == 0:
        return slice_pair(pair, (0, min(cap, len(pair.query))), (0, min(cap, len(pair.key))))
    anchor = pair.target[rng.integers(len(pair.target))]
    fraction = rng.random()
    windows = []
    for position, length in zip(anchor, (len(pair.query), len(pair.key)), strict=True):
        jitter = rng.integers(-(cap // 16), cap // 16 + 1)
        start = int(np.clip(position - int(fraction * cap) + jitter, 0, max(length - cap, 0)))
        windows.append((start, min(start + cap, length)))
    return slice_pair(pair, windows[0], windows[1])


def slice_pair(pair: Pair, query: tuple[int, int], key: tuple[int, int]) -> Pair:
    """The pair restricted to query[start, stop) and key[start, stop); targets that leave a window are dropped."""
    i, j = pair.target[:, 0], pair.target[:, 1]
    inside = (i >= query[0]) & (i < query[1]) & (j >= key[0]) & (j < key[1])
    target = pair.target[inside] - np.array([query[0], key[0]])
    return replace(pair, query=pair.query[slice(*query)], key=pair.key[slice(*key)], target=target)


@dataclass(frozen=True)
class EvaluationSet:
    """Fixed pairs to evaluate on, and how many drawn pairs were left out for being longer than the cap."""

    pairs: tuple[Pair, ...]
    skipped: int


def evaluation_pairs(families: Sequence[Family], per_family: int, cap: int, seed: int) -> EvaluationSet:
    """At most ``per_family`` distinct pairs of each family, whole sequences, the same ones for the same seed.

    Records that are one family count as one, under one of ``identity.labels``; the first ones' pairs go first. Pairs
    with a side longer than ``cap`` are skipped and counted, never cropped: cropping would change the task.
    """
    pairs: list[Pair] = []
    skipped = 0
    left: dict[str, int] = {}
    for index, (family, label) in enumerate(zip(families, labels(families), strict=True)):
        rng = np.random.default_rng([seed, index])
        drawn = list(_distinct_pairs(len(family.sequences), left.get(label, per_family), rng))
        left[label] = left.get(label, per_family) - len(drawn)
        for first, second in drawn:
            pair = _pair(family, label, first, second, len(pairs))
            if max(len(pair.query), len(pair.key)) > cap or len(pair.target) == 0:
                skipped += 1
            else:
                pairs.append(pair)
    return EvaluationSet(tuple(pairs), skipped)


def _distinct_pairs(n: int, most: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """At most so many of the pairs first < second below n, in random order. Time and memory in proportion to n^2 up to
    ``_FEW`` pairs, and to ``most`` beyond."""
    count = n * (n - 1) // 2
    drawn = rng.permutation(count)[:most] if count <= _FEW else rng.choice(count, min(most, count), replace=False)
    before = np.cumsum(np.arange(n - 1, -1, -1))  # pairs whose first is i or less
    first = np.searchsorted(before, drawn, side="right")
    second = drawn - before[first] + n
    yield from zip(first.tolist(), second.tolist(), strict=True)
