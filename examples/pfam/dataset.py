"""The families of a run: what is trained on, what is held out, and the pairs it is evaluated on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from .config import Config
from .pairs import EvaluationSet, Family, evaluation_pairs, family_from_alignment
from .stockholm import read_stockholm, stockholm_files
from .streaming import stored_families

# Not the run's seed: runs that differ in their seed are compared on the same pairs.
_PAIR_SEED = 0

_ACCESSION = re.compile(r"(?<![A-Za-z0-9])PF\d{5}(?!\d)")

MOST_HELD_OUT = 200
"""Families held out of the training data at most: more would cost time at each evaluation, and decide nothing."""


@dataclass(frozen=True)
class Dataset:
    """``dropped`` are training families left out because the evaluation holds the same family."""

    train: tuple[Family, ...]
    heldout_families: tuple[Family, ...]
    heldout: EvaluationSet
    dropped: tuple[str, ...]

    @property
    def trained_on(self) -> list[list[str]]:
        """The ``identities`` of each training family, sorted: what a checkpoint records."""
        return sorted(sorted(identities(family)) for family in self.train)

    def summary(self) -> str:
        """What the run will train and be evaluated on, in a few lines."""
        names = [family.key for family in self.heldout_families]
        lines = [
            f"training: {len(self.train)} families, {sum(len(f.sequences) for f in self.train)} sequences",
            f"held out: {len(names)} families ({in_brief(names)}), {len(self.heldout.pairs)} pairs",
        ]
        if self.heldout.skipped:
            lines.append(f"skipped:  {self.heldout.skipped} held-out pairs beyond the length cap")
        if self.dropped:
            lines.append(f"dropped from training, being held out: {', '.join(self.dropped)}")
        return "\n".join(lines)


def load_dataset(config: Config, cache: str | Path | None = None) -> Dataset:
    """Read, split by family, and draw the evaluation pairs.

    Data of at least ``config.stream_from`` megabytes are not read into memory: see ``stored_families``, whose ``cache``
    this is.
    """
    train = _families(config.data, config, cache)
    dropped: list[str] = []
    if config.eval_data is None:
        if len(train) < 2:
            raise ValueError(
                f"{config.data} holds {len(train)} families with two or more sequences; holding some out takes two "
                "(or give the held-out ones with --eval-data)"
            )
        order = np.random.default_rng(config.seed).permutation(len(train))
        cut = min(max(round(config.holdout * len(train)), 1), len(train) - 1, MOST_HELD_OUT)
        heldout = [train[index] for index in sorted(order[:cut])]
        train = [train[index] for index in sorted(order[cut:])]
    else:
        heldout = _families(config.eval_data, config, cache)
        taken = {name for family in heldout for name in identities(family)}
        dropped = [family.key for family in train if identities(family) & taken]
        train = [family for family in train if not identities(family) & taken]
    pairs = evaluation_pairs(heldout, config.eval_pairs, config.eval_cap, _PAIR_SEED)
    if not pairs.pairs:
        raise ValueError(f"no held-out pair to evaluate on ({pairs.skipped} skipped for length, cap {config.eval_cap})")
    return Dataset(tuple(train), tuple(heldout), pairs, tuple(dropped))


def identities(family: Family) -> set[str]:
    """Its name, its accession without the version, and Pfam accessions inside the name, all in lower case.

    Families that share one are taken for the same: fn3 (PF00041.20) and an other_PF00041 without accession are.
    """
    names = {family.name, family.accession.split(".")[0], *_ACCESSION.findall(family.name)}
    return {name.casefold() for name in names} - {""}


def in_brief(names: Sequence[str]) -> str:
    """The first eight names, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _families(path: str, config: Config, cache: str | Path | None) -> list[Family]:
    """The families with at least two sequences; the rest cannot make a pair."""
    size = sum(file.stat().st_size for file in stockholm_files(path))
    families: Iterable[Family]
    if size >= config.stream_from * 1_000_000:
        families = stored_families(path, cache)
    else:
        families = map(family_from_alignment, read_stockholm(path))
    limited = (
        replace(family, sequences=family.sequences[: config.max_sequences])
        for family in islice(families, config.max_families)
    )
    return [family for family in limited if len(family.sequences) > 1]
