"""Profile HMMs of families: read from files of HMMER 3, and left out by family."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from examples.common.text import one_line, visible

from .identity import Known, identities
from .pairs import ALPHABET, Family
from .profiles import KINDS
from .stockholm import shown

FloatArray = npt.NDArray[np.floating]


@dataclass(frozen=True)
class ProfileHmm:
    """A family as HMMER 3 models it.

    Attributes:
        name, accession: '' where it has none.
        columns: probabilities of the residues in its M columns, [M, 20].
    """

    name: str
    accession: str
    columns: FloatArray

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
        total = columns.sum(axis=1, keepdims=True)
        if not (np.isfinite(total) & (total > 0) & (columns >= 0)).all():
            raise ValueError(f"{shown(path)} holds an HMM, {visible(hmm.name)}, whose columns are no probabilities")
        columns /= total
        found.append(ProfileHmm(hmm.name, hmm.accession or "", columns))
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
