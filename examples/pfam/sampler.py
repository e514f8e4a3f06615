"""Training batches as a pure function of (seed, step), which is what makes a resumed run exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from .augment import insert_and_delete, mutate
from .context import Foreign, Setting, domain_cap, draw_setting, flanked, joined, truncated, unrelated
from .identity import related
from .pairs import ALPHABET, Family, IntArray, Pair, crop_pair, make_pair

PADDING = len(ALPHABET)
"""Residue code of a padded position."""
FEWEST_TARGETS = 5
"""A pair that shares fewer aligned residues is noise: two fragments that hardly overlap."""

_TRIES = 1000
T = TypeVar("T")
# Independent streams of random numbers from one seed.
_PAIRS, _POOLS, _EPOCHS, _SETTINGS = 0, 1, 2, 3
_TRUNCATED = 0.15
_FOREIGN_TRIES = 20


@dataclass(frozen=True)
class Batch:
    """Padded residues [N, L] and [N, S] with their lengths [N], and the pairs they came from."""

    query: Tensor
    key: Tensor
    query_lengths: Tensor
    key_lengths: Tensor
    pairs: tuple[Pair, ...]

    @property
    def cells(self) -> int:
        """Entries of the padded plans without their dustbins, N L S."""
        return self.query.numel() * self.key.shape[1]

    def moved(self, to: Callable[[Tensor], Tensor]) -> Batch:
        """With ``to`` of its tensors."""
        return Batch(to(self.query), to(self.key), to(self.query_lengths), to(self.key_lengths), self.pairs)


def collate(pairs: Sequence[Pair]) -> Batch:
    """Pad the pairs to the longest of each side."""

    def pad(sides: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([len(side) for side in sides])
        padded = torch.full((len(sides), int(lengths.max())), PADDING)
        for row, side in zip(padded, sides, strict=True):
            row[: len(side)] = torch.from_numpy(side)
        return padded, lengths

    query, query_lengths = pad([pair.query for pair in pairs])
    key, key_lengths = pad([pair.key for pair in pairs])
    return Batch(query, key, query_lengths, key_lengths, tuple(pairs))


def padding(batches: Sequence[Batch]) -> float:
    """The fraction of the plans' entries that is padding."""
    real = sum(int((batch.query_lengths * batch.key_lengths).sum()) for batch in batches)
    return 1 - real / sum(batch.cells for batch in batches)


class PairSampler:
    """Draws families in proportion to the square root of their size, then two of their sequences.

    Pairs are numbered, ``size`` to a step, and each is a function of the seed and its number: there is no state to
    save, and no order to lose. An epoch is ``epoch_pairs`` numbers, a random order in which a family of n sequences
    comes sqrt(n / fewest) times, rounded up or down at random: at least once each.

    The pairs of ``pool`` steps are sorted by length and cut into ``pool`` batches, which come in a random order. So
    batches hold pairs of like length, and no pair is left out for its length.

    Args:
        families: sequences may be read when they are asked for; only their number is asked for at once.
        size: pairs in a batch, over all processes.
        cells: most plan entries computed at once: ``parts`` cuts larger batches.
        cap: longest side of a training pair; longer ones are cropped around a common target pair.
        mutation_rate: each side is mutated at a rate uniform in [0, mutation_rate].
        indels: expected inserted or deleted runs per hundred residues and side.
        flanked: share of the pairs that are set in a context, see ``context``; others are whole domains.
        unrelated: share of the pairs whose sequences are of different families, or shuffled: nothing to align.
        pool: steps whose pairs are sorted together. In a larger pool lengths are more alike, so there is less padding,
            and where families are few, a batch holds fewer of them.
        rank, world: this process takes every ``world``-th pair of a batch, from ``rank`` on.

    Raises:
        ValueError: no family, or a batch has fewer pairs than there are processes.
    """

    def __init__(
        self,
        families: Sequence[Family],
        *,
        size: int,
        cells: int,
        cap: int,
        mutation_rate: float,
        indels: float,
        seed: int,
        flanked: float = 0.0,
        unrelated: float = 0.0,
        pool: int = 4,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not families:
            raise ValueError("no training family: every family was held out, or none has two sequences")
        if size < world:
            raise ValueError(f"--batch-size {size} is less than the {world} processes; each needs a pair")
        self.families, self.size, self.cells, self.cap = families, size, cells, cap
        self.mutation_rate, self.indels, self.seed = mutation_rate, indels, seed
        self.flanked, self.unrelated = flanked, unrelated if len(families) > 1 else 0.0
        self.pool, self.rank, self.world = pool, rank, world
        counts = np.array([len(family.sequences) for family in families])
        self._places = np.cumsum(np.sqrt(counts / counts.min()))
        self.epoch_pairs = int(np.ceil(self._places[-1]))
        self._epoch = _Recent(self._shuffled_epoch)
        self._batches = _Recent(self._sorted_pool)

    def pairs(self, step: int) -> list[Pair]:
        """This process's pairs of one step."""
        numbers = self._batches(step // self.pool)[step % self.pool]
        return [self._draw(int(number)) for number in numbers[self.rank :: self.world]]

    def batch(self, step: int) -> Batch:
        """The same, padded."""
        return collate(self.pairs(step))

    def parts(self, pairs: Sequence[Pair]) -> tuple[Batch, ...]:
        """The pairs in one or more batches of at most ``cells`` plan entries, unless a single pair has more."""
        parts: list[list[Pair]] = []
        for pair in sorted(pairs, key=_longer_side_first):
            if parts and _cells([*parts[-1], pair]) <= self.cells:
                parts[-1].append(pair)
            else:
                parts.append([pair])
        return tuple(collate(part) for part in parts)

    def epoch(self, step: int) -> float:
        """Epochs that are done before a step."""
        return step * self.size / self.epoch_pairs

    def family_of(self, number: int) -> int:
        """The index of the family of a pair."""
        epoch, place = divmod(number, self.epoch_pairs)
        return int(self._epoch(epoch)[place])

    def setting_of(self, number: int) -> Setting:
        """Whether a pair is plain, flanked or unrelated, and how long it will be."""
        rng = np.random.default_rng([self.seed, _SETTINGS, number])
        return draw_setting(self.flanked, self.unrelated, self.cap, rng)

    def _shuffled_epoch(self, epoch: int) -> IntArray:
        # Systematic sampling: evenly spaced points on the line on which each family occupies its weight.
        rng = np.random.default_rng([self.seed, _EPOCHS, epoch])
        points = (np.arange(self.epoch_pairs) + rng.random()) * (self._places[-1] / self.epoch_pairs)
        found = np.searchsorted(self._places, points, side="right").clip(max=len(self._places) - 1)
        return rng.permutation(found)

    def _sorted_pool(self, pool: int) -> IntArray:
        """Numbers of pairs, [pool, size]. Lengths are those before insertions and deletions, and about those with
        flanks: nothing is drawn twice."""
        first = pool * self.pool * self.size
        lengths = np.empty((self.pool * self.size, 2), dtype=np.int64)
        for offset in range(len(lengths)):
            number = first + offset
            family = self.families[self.family_of(number)]
            chosen = _two_of(family, np.random.default_rng([self.seed, _PAIRS, number]))
            length = self.setting_of(number).length
            lengths[offset] = [length or min(len(family.sequences[index]), self.cap) for index in chosen]
        rng = np.random.default_rng([self.seed, _POOLS, pool])
        # The plan is as large as the longest sides allow, so the longer side decides, then the shorter.
        order = np.lexsort((rng.random(len(lengths)), lengths.min(axis=1), lengths.max(axis=1)))
        return rng.permutation((first + order).reshape(self.pool, self.size))

    def _draw(self, number: int) -> Pair:
        rng = np.random.default_rng([self.seed, _PAIRS, number])
        setting = self.setting_of(number)
        foreign = self._foreign(family := self.families[self.family_of(number)], rng)
        pair = self._domain(family, setting, rng)
        if setting.kind == "unrelated":
            pair = unrelated(pair, foreign, self.cap, rng)
        if setting.kind != "flanked":
            return self._mutated(pair, rng)
        if setting.second_domain and len(self.families) > 1:
            room = setting.length - max(len(pair.query), len(pair.key))
            second = self._domain(self._other(family, rng), setting, rng)
            if max(len(second.query), len(second.key)) <= room:
                pair = joined(pair, second)
        return flanked(self._mutated(pair, rng), setting.length, foreign, rng)

    def _domain(self, family: Family, setting: Setting, rng: np.random.Generator) -> Pair:
        """A pair of a family, or of another in its place, without flanks."""
        for attempt in range(1, _TRIES + 1):
            first, second = _two_of(family, rng)
            pair = insert_and_delete(make_pair(family, first, second), self.indels, rng)
            pair = crop_pair(pair, domain_cap(setting.length, rng) if setting.length else self.cap, rng)
            if setting.kind == "flanked" and rng.random() < _TRUNCATED:
                pair = truncated(pair, FEWEST_TARGETS, rng)
            if len(pair.target) >= FEWEST_TARGETS:
                return pair
            if attempt % 20 == 0:  # a family of fragments: another in its place
                family = self.families[int(rng.integers(len(self.families)))]
        raise ValueError(
            f"{_TRIES} drawn pairs in a row share fewer than {FEWEST_TARGETS} aligned residues; is the data an "
            "alignment?"
        )

    def _mutated(self, pair: Pair, rng: np.random.Generator) -> Pair:
        rates = rng.random(2) * self.mutation_rate
        return replace(pair, query=mutate(pair.query, rates[0], rng), key=mutate(pair.key, rates[1], rng))

    def _foreign(self, family: Family, rng: np.random.Generator) -> Foreign:
        """Sequences of families other than ``family`` and than each other."""
        known = [family]

        def draw() -> IntArray:
            other = self._other(family, rng)
            for _ in range(_FOREIGN_TRIES):
                if all(len(set(related([before, other]))) > 1 for before in known):
                    known.append(other)
                    break
                other = self._other(family, rng)
            else:  # there are not so many families
                return rng.permutation(_sequence_of(other, rng))
            return _sequence_of(other, rng)

        return draw

    def _other(self, family: Family, rng: np.random.Generator) -> Family:
        """A family that is drawn like any other, and not this one where there are several."""
        for _ in range(_FOREIGN_TRIES):
            other = self.families[int(rng.integers(len(self.families)))]
            if len(set(related([family, other]))) > 1:
                break
        return other


def _sequence_of(family: Family, rng: np.random.Generator) -> IntArray:
    return family.sequences[int(rng.integers(len(family.sequences)))].residues.astype(np.int64)


def _two_of(family: Family, rng: np.random.Generator) -> tuple[int, int]:
    first, second = rng.choice(len(family.sequences), 2, replace=False)
    return int(first), int(second)


def _longer_side_first(pair: Pair) -> tuple[int, int]:
    n, m = len(pair.query), len(pair.key)
    return max(n, m), min(n, m)


def _cells(pairs: Sequence[Pair]) -> int:
    return len(pairs) * max(len(pair.query) for pair in pairs) * max(len(pair.key) for pair in pairs)


class _Recent(Generic[T]):
    """The last two results of a function of an integer: consecutive steps share their pool, and nearly always their
    epoch."""

    def __init__(self, function: Callable[[int], T]) -> None:
        self._function = function
        self._results: dict[int, T] = {}

    def __call__(self, index: int) -> T:
        if index not in self._results:
            if len(self._results) == 2:
                self._results.pop(next(iter(self._results)))
            self._results[index] = self._function(index)
        return self._results[index]
