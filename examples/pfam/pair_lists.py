"""Which pairs of many proteins are to be aligned, in chunks of like lengths: all, one against the rest, or a table's.

The order is a function of the proteins alone, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from examples.common.text import clip, utf8, visible

from .sequences import Protein, plain_name
from .source import DamagedError, TooLargeError, UnlikelyError, lines
from .stockholm import shown

IntArray = npt.NDArray[np.int64]

ALL, FIRST = "all", "first"
CHUNK = 64
"""Pairs that are aligned and written together."""
_MOST_LISTED = 50_000_000


@dataclass(frozen=True)
class PairList:
    """Pairs of ``proteins``, by their numbers.

    Attributes:
        total: pairs to align.
        left_out: pairs with more than ``most`` pairs of residues, which are not.
        listed: [p, 2], in the order of the work; None for all against all, whose pairs are not listed.
    """

    proteins: Sequence[Protein]
    most: int
    total: int
    left_out: int
    listed: IntArray | None = None

    @classmethod
    def all_against_all(cls, proteins: Sequence[Protein], most: int) -> PairList:
        """Every two of them, the one that was read first as the query."""
        lengths = np.sort(np.array([len(protein.letters) for protein in proteins], dtype=np.int64))
        # How many shorter, or equally long, ones can stand beside each.
        fitting = np.minimum(np.searchsorted(lengths, most // lengths, side="right"), np.arange(len(lengths)))
        every = len(lengths) * (len(lengths) - 1) // 2
        return cls(proteins, most, int(fitting.sum()), every - int(fitting.sum()))

    @classmethod
    def first_against_rest(cls, proteins: Sequence[Protein], most: int) -> PairList:
        """The first as the query, every other as the key."""
        others = np.arange(1, len(proteins))
        return cls._of(proteins, np.stack([np.zeros_like(others), others], axis=1), most)

    @classmethod
    def from_table(cls, path: str, proteins: Sequence[Protein], most: int, notes: list[str]) -> PairList:
        """The pairs that the lines of a table name, the query first, with a tab between; a pair is aligned once.

        Lines that begin with '#' and empty ones are left out.

        Raises:
            ValueError: a line does not hold two names, or one that no protein has; the message names file and line.
        """
        number_of = {protein.name: number for number, protein in enumerate(proteins)}
        found: dict[tuple[int, int], None] = {}
        rows = 0
        try:
            for line, raw in lines(path):
                text = utf8(raw)
                if not text or text.startswith("#"):
                    continue
                rows += 1
                where = f"{shown(path)}, line {line}"
                names = text.split("\t")
                if len(names) != 2:
                    raise ValueError(f"{where}: '{clip(visible(text))}' is not two names with a tab between")
                pair = tuple(number_of.get(plain_name(name.strip()), -1) for name in names)
                if -1 in pair:
                    unknown = clip(visible(names[pair.index(-1)]))
                    header = "; if that line is a header, begin it with '#'" if rows == 1 else ""
                    raise ValueError(
                        f"{where}: no sequence is called {unknown!r}; a name is what stands before the first blank of "
                        f"a FASTA header{header}"
                    )
                found[pair[0], pair[1]] = None
                if len(found) > _MOST_LISTED:
                    raise ValueError(f"{where}: more than {_MOST_LISTED} pairs; cut the table")
        except (DamagedError, TooLargeError, UnlikelyError) as error:
            raise ValueError(f"{shown(path)}: {error}; expected a table of two names a line") from error
        if not found:
            raise ValueError(f"{shown(path)} names no pair; expected lines of two names with a tab between")
        if rows > len(found):
            notes.append(f"{shown(path)}: {rows - len(found)} pairs are named again; they are aligned once")
        return cls._of(proteins, np.array(list(found), dtype=np.int64), most)

    @classmethod
    def _of(cls, proteins: Sequence[Protein], pairs: IntArray, most: int) -> PairList:
        lengths = np.array([len(protein.letters) for protein in proteins], dtype=np.int64)[pairs].reshape(-1, 2)
        fits = lengths.prod(axis=1) <= most
        kept = pairs[fits]
        order = np.lexsort((lengths[fits, 0], lengths[fits, 1], lengths[fits].max(axis=1)))
        return cls(proteins, most, len(kept), len(pairs) - len(kept), kept[order])

    def chunks(self, start: int = 0) -> Iterator[IntArray]:
        """The pairs from the one of number ``start`` on, [up to CHUNK, 2] at a time; ``start`` ends a chunk."""
        waiting: list[IntArray] = []
        number = count = 0
        for part in self._parts():
            if number + len(part) <= start and not waiting:
                number += len(part)
                continue
            waiting.append(part[max(start - number, 0) :])
            number += len(part)
            count += len(waiting[-1])
            if count >= CHUNK:
                joined = np.concatenate(waiting)
                for at in range(0, len(joined) - CHUNK + 1, CHUNK):
                    yield joined[at : at + CHUNK]
                waiting = [joined[len(joined) - len(joined) % CHUNK :]] if len(joined) % CHUNK else []
                count = len(joined) % CHUNK
        if count:
            yield np.concatenate(waiting)

    def _parts(self) -> Iterator[IntArray]:
        if self.listed is not None:
            for at in range(0, len(self.listed), CHUNK):
                yield self.listed[at : at + CHUNK]
            return
        lengths = np.array([len(protein.letters) for protein in self.proteins], dtype=np.int64)
        order = np.lexsort((np.arange(len(lengths)), lengths))
        for rank, one in enumerate(order):
            others = order[:rank][lengths[order[:rank]] * lengths[one] <= self.most]
            for keys, turned in ((others[others > one], False), (others[others < one], True)):
                pairs = np.stack([np.full_like(keys, one), keys], axis=1)
                if len(pairs):
                    yield pairs[:, ::-1] if turned else pairs
