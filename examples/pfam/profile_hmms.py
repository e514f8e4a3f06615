"""Profile HMMs: read from files of HMMER 3, left out by family, and alignments drawn from them.

Pfam has twenty thousand, each made of its family's alignment. What is drawn from one has the conserved columns of a
real family and its insertions and deletions, if not its phylogeny: families to train on where alignments are few.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from examples.common.text import one_line

from .augment import BACKGROUND
from .identity import Known, identities
from .pairs import ALPHABET, Family
from .profiles import KINDS
from .stockholm import shown

FloatArray = npt.NDArray[np.floating]

ROWS = 6
"""Sequences that are drawn of a family."""
_SHARPNESS = (1.0, 2.2)
"""Residues are drawn from a column's odds to a power between these, one for a family: see ``sharpened``."""
_LONGEST_INSERTION = 100
SHORTEST, LONGEST = 30, 400
"""Columns of the families that are drawn from."""


@dataclass(frozen=True)
class ProfileHmm:
    """A family as HMMER 3 models it.

    Attributes:
        name, accession: '' where it has none.
        columns: probabilities of the residues in its M columns, [M, 20].
        transitions: probabilities of what follows the beginning and each column, [M + 1, 7]: from the column to the
            next, to an insertion, to a deletion; from an insertion to the next column, to a further residue; from a
            deletion to the next column, to a further deletion.
    """

    name: str
    accession: str
    columns: FloatArray
    transitions: FloatArray

    @property
    def key(self) -> str:
        return f"{self.name} ({self.accession})" if self.accession else self.name


def read_profile_hmms(path: str | Path) -> list[ProfileHmm]:
    """Those of a file of HMMER 3, text or binary, by pyhmmer.

    Raises:
        FileNotFoundError: there is none.
        ValueError: pyhmmer is not installed, or the file holds something else, none, or nucleotides' HMMs.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no profile HMMs at {shown(path)}")
    found = []
    for hmm in _hmms(path):
        letters = hmm.alphabet.symbols[:KINDS]
        if sorted(letters) != sorted(ALPHABET[:KINDS]):
            raise ValueError(f"{shown(path)} holds HMMs of other letters than amino acids: {letters!r}")
        order = [letters.index(letter) for letter in ALPHABET[:KINDS]]
        columns = np.asarray(hmm.match_emissions, dtype=np.float64)[1:, order]
        columns /= columns.sum(axis=1, keepdims=True)
        transitions = np.asarray(hmm.transition_probabilities, dtype=np.float64)
        found.append(ProfileHmm(hmm.name, hmm.accession or "", columns, transitions))
    if not found:
        raise ValueError(f"{shown(path)} holds no profile HMM")
    return found


def _hmms(path: str | Path) -> Iterator[Any]:
    try:
        import pyhmmer
    except ImportError as error:
        raise ValueError("profile HMMs are read by pyhmmer; pip install pyhmmer") from error
    try:
        with pyhmmer.plan7.HMMFile(path) as file:
            yield from file
    except (EOFError, OSError, ValueError) as error:
        raise ValueError(f"{shown(path)} is not a readable file of profile HMMs ({one_line(error)})") from error


def without(hmms: Iterable[ProfileHmm], families: Iterable[Family]) -> list[ProfileHmm]:
    """Those that are, as far as names tell, of none of the families."""
    known = Known(identities(family) for family in families)
    return [hmm for hmm in hmms if not known.may_hold(hmm)]


def taught(hmms: Iterable[ProfileHmm]) -> list[list[str]]:
    """The ``identities`` of each, sorted: what a file of weights records."""
    return sorted(sorted(identities(hmm)) for hmm in hmms)


def sharpened(columns: FloatArray, power: float) -> FloatArray:
    """Columns [M, 20] whose odds against the background are raised to a power.

    HMMER blurs columns until a family's mean information is 0.6 bits a place, and what is drawn from them as they are
    is harder to recognise than any relative.
    """
    sharp = (columns / BACKGROUND) ** power * BACKGROUND
    return np.asarray(sharp / sharp.sum(axis=1, keepdims=True))


def drawn_families(hmms: Sequence[ProfileHmm], count: int, seed: int) -> Iterator[str]:
    """Stockholm records of ``ROWS`` sequences each, drawn from ``count`` of the HMMs, or from all that are between
    ``SHORTEST`` and ``LONGEST`` columns long: names begin with "drawn_", accessions are the HMMs'.

    Every record is a function of the HMMs and the seed.
    """
    rng = np.random.default_rng(seed)
    fitting = [hmm for hmm in hmms if SHORTEST <= len(hmm.columns) <= LONGEST]
    for index in rng.permutation(len(fitting))[:count]:
        hmm = fitting[index]
        sharp = np.cumsum(sharpened(hmm.columns, rng.uniform(*_SHARPNESS)), axis=1)
        rows = [_drawn(sharp, hmm.transitions, rng) for _ in range(ROWS)]
        named = [f"#=GF ID drawn_{hmm.name}", *([f"#=GF AC {hmm.accession}"] if hmm.accession else [])]
        yield "\n".join(["# STOCKHOLM 1.0", *named, *_aligned_rows(rows), "//", ""])


def _drawn(columns: FloatArray, transitions: FloatArray, rng: np.random.Generator) -> list[str]:
    """What stands in and after each column, and before the first one, [M + 1]: a letter or a gap, then insertions in
    lower case. ``columns`` are cumulative."""
    found, state = ["-"], "M"
    while len(found) <= len(columns):
        to_match, to_insert, to_delete = _from_state(transitions[len(found) - 1], state)
        drawn = rng.random() * (to_match + to_insert + to_delete)
        if drawn < to_insert and len(found[-1]) < _LONGEST_INSERTION:
            state = "I"
            found[-1] += _letter(_BACKGROUND, rng).lower()
        elif drawn < to_insert + to_delete:
            state = "D"
            found.append("-")
        else:
            state = "M"
            found.append(_letter(columns[len(found) - 1], rng))
    return found


_BACKGROUND = np.cumsum(BACKGROUND / BACKGROUND.sum())


def _from_state(row: FloatArray, state: str) -> tuple[float, float, float]:
    """Weights of a match, an insertion and a deletion next."""
    if state == "M":
        return float(row[0]), float(row[1]), float(row[2])
    return (float(row[3]), float(row[4]), 0.0) if state == "I" else (float(row[5]), 0.0, float(row[6]))


def _letter(cumulative: FloatArray, rng: np.random.Generator) -> str:
    return ALPHABET[min(int(np.searchsorted(cumulative, rng.random())), KINDS - 1)]


def _aligned_rows(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, place)) for place in zip(*rows, strict=True)]
    for number, row in enumerate(rows, start=1):
        text = "".join(part.ljust(width, "-") for part, width in zip(row, widths, strict=True))
        yield f"drawn{number} {text[1:]}"  # there is no column before the first one
