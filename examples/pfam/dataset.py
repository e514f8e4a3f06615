"""The families of a run: what is trained on, what is held out, and the pairs it is evaluated on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from examples.common.files import is_stream

from .config import Config
from .identity import identities, related
from .pairs import EvaluationSet, Family, evaluation_pairs, family_from_alignment
from .source import MB, MOST_TEXT, TooLargeError
from .stockholm import StockholmError, read_stockholm, shown, stockholm_files
from .streaming import stored_families

# Not the run's seed: runs that differ in their seed are compared on the same pairs.
_PAIR_SEED = 0

_IN_MEMORY = 128
"""Megabytes of text, unpacked, that are read into memory: of a file more goes to a store, of a pipe more is refused."""

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
        lines += nucleotide_notes((*self.train, *self.heldout_families))
        return "\n".join(lines)


def load_dataset(config: Config, cache: str | Path | None = None, max_text: float = MOST_TEXT) -> Dataset:
    """Read, split by family, and draw the evaluation pairs.

    Records that are, or may be, of one family stay together: see ``identity``.

    Args:
        cache: where the stores are of data that are not read into memory, see ``read_families``.
        max_text: megabytes of text, unpacked, that are read of each source.
    """

    def read(path: str) -> list[Family]:
        limits = (config.stream_from, config.max_families, config.max_sequences)
        return read_families(path, *limits, cache=cache, max_text=max_text)

    train = read(config.data)
    dropped: list[str] = []
    if config.eval_data is None:
        groups = np.array(related(train))
        count = len(set(groups))
        if count < 2:
            same = " that cannot be told apart by ID and accession" if len(train) > 1 else ""
            raise ValueError(
                f"{shown(config.data)} holds {len(train)} families with two or more sequences{same}; holding some out "
                "takes two (or give the held-out ones with --eval-data)"
            )
        order = np.random.default_rng(config.seed).permutation(count)
        cut = min(max(round(config.holdout * count), 1), count - 1, MOST_HELD_OUT)
        out = np.isin(groups, order[:cut])
        heldout = [family for family, left in zip(train, out, strict=True) if left]
        train = [family for family, left in zip(train, out, strict=True) if not left]
    else:
        heldout = read(config.eval_data)
        together = related([*heldout, *train])
        taken = set(together[: len(heldout)])
        kept = [group not in taken for group in together[len(heldout) :]]
        dropped = [family.key for family, keep in zip(train, kept, strict=True) if not keep]
        train = [family for family, keep in zip(train, kept, strict=True) if keep]
    pairs = evaluation_pairs(heldout, config.eval_pairs, config.eval_cap, _PAIR_SEED)
    if not pairs.pairs:
        raise ValueError(f"no held-out pair to evaluate on ({pairs.skipped} skipped for length, cap {config.eval_cap})")
    return Dataset(tuple(train), tuple(heldout), pairs, tuple(dropped))


def in_brief(names: Sequence[str]) -> str:
    """The first eight names, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def nucleotide_notes(families: Sequence[Family]) -> list[str]:
    """A line on those whose letters look like DNA's or RNA's, if there are any."""
    found = [family.key for family in families if family.nucleotides]
    looks, are = ("looks", "is") if len(found) == 1 else ("look", "are")
    whose = f"note: {len(found)} of {len(families)} alignments {looks} like nucleotides ({in_brief(found)})"
    return [f"{whose}, but {are} read as residues; translate DNA and RNA first"] if found else []


def read_families(
    path: str,
    stream_from: float = Config.stream_from,
    max_families: int | None = None,
    max_sequences: int | None = None,
    *,
    cache: str | Path | None = None,
    max_text: float = MOST_TEXT,
) -> list[Family]:
    """The records with at least two sequences; the rest cannot make a pair.

    Args:
        stream_from: megabytes, packed if they are, from which on a file is read from a store on disk; see
            ``stored_families``, whose ``cache`` this takes. So is one that turns out to hold more than 128 MB of text.
        max_families, max_sequences: so many records, and so many sequences of each, at most.
        max_text: megabytes of text, unpacked, at most.

    Raises:
        StockholmError: it breaks the format, or there is more text; or a pipe, which can be read only once, holds more
            than goes into memory.
    """
    in_memory = min(max(stream_from, _IN_MEMORY), max_text)

    def limited(families: Iterable[Family]) -> list[Family]:
        first = islice(families, max_families)
        cut = (replace(family, sequences=family.sequences[:max_sequences]) for family in first)
        return [family for family in cut if len(family.sequences) > 1]

    if not is_stream(path) and sum(file.stat().st_size for file in stockholm_files(path)) >= stream_from * MB:
        return limited(stored_families(path, cache, max_text))
    try:
        return limited(map(family_from_alignment, read_stockholm(path, in_memory, in_memory)))
    except StockholmError as error:
        if not isinstance(error.__cause__, TooLargeError) or in_memory == max_text:
            raise
        if is_stream(path):
            raise ValueError(
                f"{shown(path)} holds more than {in_memory:g} MB of text, too much to read from a pipe; write it to a "
                "file, which can be read from disk"
            ) from error
    return limited(stored_families(path, cache, max_text))
