"""Profile HMMs of families: read from files of HMMER 3, and left out by family."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from examples.common.files import is_stream
from examples.common.text import clip, one_line, visible

from .identity import Known, Named, identities
from .pairs import ALPHABET, Family
from .profiles import KINDS
from .stockholm import shown

FloatArray = npt.NDArray[np.floating]
Record = TypeVar("Record", bound=Named)


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
    """Those of a file of HMMER 3, text or binary, plain or gzip, by pyhmmer.

    In a process of its own, for some damaged files end the one that reads them.

    Raises:
        FileNotFoundError: there is none.
        ValueError: pyhmmer is not installed, or the file holds something else, none, or nucleotides' HMMs.
    """
    if importlib.util.find_spec("pyhmmer") is None:
        raise ValueError("profile HMMs are read by pyhmmer; pip install 'pyhmmer>=0.12'")
    if is_stream(str(path)):
        raise ValueError(f"{shown(path)} is a pipe, which HMMER reads more than once; write it into a file first")
    if not os.path.isfile(path):  # a name that no file system takes is none either
        raise FileNotFoundError(f"no profile HMMs at {shown(path)}")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        try:
            found = executor.submit(_read, str(path)).result()
        except BrokenProcessPool as error:
            raise ValueError(f"{shown(path)} is not a readable file of profile HMMs: HMMER broke down at it") from error
    if not found:
        raise ValueError(f"{shown(path)} holds no profile HMM")
    return found


def _read(path: str) -> list[ProfileHmm]:
    import pyhmmer

    try:
        with pyhmmer.plan7.HMMFile(path) as file:
            found = [_in_our_order(hmm, path) for hmm in file]
    except _Unfit as error:
        raise ValueError(str(error)) from error
    except (EOFError, MemoryError, OSError, RuntimeError, ValueError) as error:
        # In a message alone: pyhmmer's own errors do not come through from another process.
        reason = clip(one_line(error), 200)
        raise ValueError(f"{shown(path)} is not a readable file of profile HMMs ({reason})") from None
    return found


class _Unfit(Exception):
    """An HMM that can be read, and is none of a protein family."""


def _in_our_order(hmm: Any, path: str) -> ProfileHmm:
    letters = hmm.alphabet.symbols[:KINDS]
    if sorted(letters) != sorted(ALPHABET[:KINDS]):
        raise _Unfit(f"{shown(path)} holds HMMs of other letters than amino acids: {letters!r}")
    order = [letters.index(letter) for letter in ALPHABET[:KINDS]]
    columns = np.asarray(hmm.match_emissions, dtype=np.float64)[1:, order]
    total = columns.sum(axis=1, keepdims=True)
    if not (np.isfinite(total) & (total > 0) & (columns >= 0)).all():
        raise _Unfit(f"{shown(path)} holds an HMM, {visible(hmm.name)}, whose columns are no probabilities")
    return ProfileHmm(hmm.name, hmm.accession or "", columns / total)


def without(records: Iterable[Record], families: Iterable[Family]) -> list[Record]:
    """Those that are, as far as names tell, of none of the families."""
    known = Known(identities(family) for family in families)
    return [record for record in records if not known.may_hold(record)]


def taught(records: Iterable[Named]) -> list[list[str]]:
    """The ``identities`` of each, once and sorted: what a file of weights records."""
    return [list(names) for names in sorted({tuple(sorted(identities(record))) for record in records})]
