"""The aligner from Python: two sequences in; pairs of residues, confidences, the plan and the text out.

>>> from examples.pfam import align
>>> found = align("MKVLAAGWWGHPDEACDEFGHIKL", "MKVLAGHPDEACDEYGHIKLMN")
>>> print(found.text)
"""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from examples.common.text import clip

from .alignment import PairwiseAlignment, Summary
from .decode import DECODERS, DEFAULT_DECODER
from .encodings import Encodings
from .evaluate import aligned
from .homology import homology
from .pairs import Pair, encode
from .release import TrainedAligner, load_aligner
from .runs import MODES
from .sequences import LONGEST, MOST_PAIRS, TOO_LONG, clean_letters, count_of_pairs, plain_name
from .three_lines import LEGEND, summary_lines, three_lines

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]

MONOTONE = tuple(name for name in DECODERS if name != "mutual")
"""The decoders whose pairs never cross, as columns need it."""
BATCH = 32
"""Pairs that are aligned at once; of long sequences fewer, see ``evaluate.CELLS``."""

_ONE_AT_A_TIME = threading.Lock()
"""``mode`` is set in the model, which several threads share."""


@dataclass(frozen=True)
class AlignedPair:
    """Two aligned sequences.

    Attributes:
        names: of the query and the key.
        alignment: columns, letters and the confidence of every column.
        plan: the attention, [n+1, m+1], the last row and column for having no partner; None where it was not kept.
        homology: probability that the two are related at all, where half of all pairs are; None where the ends were
            given, by ``mode``, or the aligner cannot say.
        log_odds: the pair HMM's log odds of the same, in nats; None without a pair HMM.
    """

    names: tuple[str, str]
    alignment: PairwiseAlignment
    plan: FloatArray | None
    homology: float | None
    log_odds: float | None

    @cached_property
    def pairs(self) -> IntArray:
        """Residues that are aligned, from 0, [p, 2], in order."""
        return self.alignment.columns[self.alignment.paired]

    @cached_property
    def confidence(self) -> FloatArray:
        """Of each pair, in [0, 1], [p]."""
        return self.alignment.confidence[self.alignment.paired]

    @cached_property
    def summary(self) -> Summary:
        """The alignment in figures."""
        return self.alignment.summary()

    @property
    def text(self) -> str:
        """What ``align`` prints: the three lines and the confidence, what they mean, what they amount to."""
        lines = three_lines(self.alignment, self.names)
        return f"{lines}\n\n{LEGEND}\n\n{summary_lines(self.alignment, self.names, self.homology)}"

    def __str__(self) -> str:
        return self.text


def align(
    query: str,
    key: str,
    *,
    names: tuple[str, str] = ("query", "key"),
    mode: str = "auto",
    decoder: str = DEFAULT_DECODER,
    checkpoint: str | Path | None = None,
) -> AlignedPair:
    """Align two proteins.

    Args:
        query, key: letters of amino acids in either case; gaps and a final '*' are left out.
        names: to show them by.
        mode: "auto", the ends as the sequences suggest; "global", from end to end; "local", only a part is shared.
        decoder: "f1", "accuracy" or "monotone", see ``decode.py``.
        checkpoint: a released aligner or a run's folder; None is the shipped aligner. It is loaded once.

    Raises:
        ValueError: a sequence is empty, has what is no amino acid's letter, or the two are too long for memory; an
            option is none of its values.
        TypeError: an argument is of another type.
        FileNotFoundError: there is no such checkpoint.
        FloatingPointError: its weights are those of a run that diverged.
    """
    for name, value in (("query", query), ("key", key)):
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a string, letters of amino acids, got {_brief(value)}")
    names = _two_strings("names", names)
    return align_many([(query, key)], names=[names], mode=mode, decoder=decoder, checkpoint=checkpoint)[0]


def align_many(
    pairs: Sequence[tuple[str, str]],
    *,
    names: Sequence[tuple[str, str]] | None = None,
    mode: str = "auto",
    decoder: str = DEFAULT_DECODER,
    checkpoint: str | Path | None = None,
    batch_size: int = BATCH,
    keep_plans: bool = True,
) -> list[AlignedPair]:
    """Align many pairs of proteins, batched by their lengths, several times faster than one by one; in their order.

    Args:
        pairs: of sequences; the rest is as in ``align``.
        names: of each pair.
        batch_size: pairs at once, from 1.
        keep_plans: whether the objects hold their plans, 8 bytes for every pair of residues.

    Raises:
        ValueError, TypeError, FileNotFoundError: see ``align``; the number of ``names`` is another. Nothing was
            aligned.
    """
    _check_options(mode, decoder, batch_size)
    if checkpoint is not None and not isinstance(checkpoint, str | os.PathLike):
        raise TypeError(f"checkpoint must be a path, or None for the shipped aligner, got {_brief(checkpoint)}")
    given = _pairs_of_strings("pairs", pairs)
    called = [("query", "key")] * len(given) if names is None else _pairs_of_strings("names", names)
    if len(called) != len(given):
        raise ValueError(f"names must be as many as pairs, {len(given)}, got {len(called)}")
    found: list[AlignedPair | None] = [None] * len(given)
    asked = []
    for number, (rows, of_pair) in enumerate(zip(given, called, strict=True)):
        place = f" of pairs[{number}]" if len(given) > 1 else ""
        letters = tuple(clean_letters(row, f"{_brief(name)}{place}") for row, name in zip(rows, of_pair, strict=True))
        n, m = map(len, letters)
        if max(n, m) > LONGEST:
            raise ValueError(f"{_brief(of_pair[0 if n > m else 1])}{place} has {TOO_LONG}")
        if n * m > MOST_PAIRS:
            raise ValueError(
                f"{n} and {m} residues{place} are more than {count_of_pairs(MOST_PAIRS)} pairs; cut the sequences"
            )
        shown = (plain_name(of_pair[0]) or "query", plain_name(of_pair[1]) or "key")
        asked.append(Asked(number, shown, (letters[0], letters[1])))
    aligner = _loaded(None if checkpoint is None else str(checkpoint))
    with _ONE_AT_A_TIME:
        for of, pair in solve(aligner, asked, mode, decoder, batch_size, keep_plans):
            found[of.number] = pair
    return [pair for pair in found if pair is not None]


@dataclass(frozen=True)
class Asked:
    """A pair to align: its number, names, and letters as ``clean_letters`` makes them."""

    number: int
    names: tuple[str, str]
    letters: tuple[str, str]


def solve(
    aligner: TrainedAligner,
    asked: Sequence[Asked],
    mode: str = "auto",
    decoder: str = DEFAULT_DECODER,
    batch_size: int = BATCH,
    keep_plans: bool = False,
    known: Encodings | None = None,
) -> Iterator[tuple[Asked, AlignedPair]]:
    """Align them as batches are done, in order of length: the one place that asks the aligner.

    ``known`` has the sequences that were encoded before, by the same aligner, and remembers these.

    Raises:
        ValueError: ``mode`` or ``decoder`` is none of its names.
    """
    _check_options(mode, decoder, batch_size)
    nothing = np.zeros((0, 2), dtype=np.int64)
    pairs = [Pair("", a.names, encode(a.letters[0]), encode(a.letters[1]), nothing, k) for k, a in enumerate(asked)]
    before, aligner.model.mode = aligner.model.mode, mode
    try:
        for found in aligned(aligner.model, pairs, batch_size, known=known):
            of = asked[found.pair.number]
            decoded = DECODERS[decoder](found.plan)
            # What the probability was fitted on had nothing said of its ends.
            judged = mode == "auto" and found.log_odds is not None
            related = homology(aligner, found.log_odds or 0.0, found.plan, decoded, decoder) if judged else None
            alignment = PairwiseAlignment.from_plan(of.letters, found.plan, decoded)
            plan = found.plan if keep_plans else None
            yield of, AlignedPair(of.names, alignment, plan, related, found.log_odds)
    finally:
        aligner.model.mode = before


def _check_options(mode: str, decoder: str, batch_size: int) -> None:
    for name, value, allowed in (("mode", mode, tuple(MODES)), ("decoder", decoder, MONOTONE)):
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {_brief(value)}")
    try:
        operator.index(batch_size)
    except TypeError:
        raise TypeError(f"batch_size must be a whole number, got {_brief(batch_size)}") from None
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def _pairs_of_strings(name: str, values: Any) -> list[tuple[str, str]]:
    values = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | Mapping):
        raise TypeError(f"{name} must be a sequence of two strings each, got {_brief(values)}")
    return [_two_strings(f"{name}[{number}]", value) for number, value in enumerate(values)]


def _two_strings(name: str, value: Any) -> tuple[str, str]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise TypeError(f"{name} must be two strings, got {_brief(value)}")
    if len(value) != 2:
        raise ValueError(f"{name} must be two strings, got {len(value)}: {_brief(value)}")
    for index, one in enumerate(value):
        if not isinstance(one, str):
            raise TypeError(f"{name}[{index}] must be a string, got {_brief(one)}")
    return value[0], value[1]


def _brief(value: Any) -> str:
    return clip(repr(value))


@lru_cache(maxsize=4)
def _loaded(checkpoint: str | None) -> TrainedAligner:
    return load_aligner(checkpoint)
