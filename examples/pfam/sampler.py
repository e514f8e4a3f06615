"""Training batches as a pure function of (seed, step), which is what makes a resumed run exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .augment import insert_and_delete, mutate
from .pairs import ALPHABET, Family, Pair, crop_pair, make_pair

PADDING = len(ALPHABET)
"""Residue code of a padded position."""


@dataclass(frozen=True)
class Batch:
    """Padded residues [N, L] and [N, S] with their lengths [N], and the pairs they came from."""

    query: Tensor
    key: Tensor
    query_lengths: Tensor
    key_lengths: Tensor
    pairs: tuple[Pair, ...]


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


class PairSampler:
    """Draws families with probability proportional to the square root of their size, then two of their sequences.

    ``batch(step)`` depends on nothing but the seed and the step: no state to save, and no order to lose. Three times as
    many pairs as needed are drawn and a run of neighbours in length is kept, so that little of a batch is padding.

    Args:
        size: most pairs in a batch.
        cells: most plan entries in a batch: batches of long pairs are smaller, so that steps cost about the same.
        cap: longest side of a training pair; longer ones are cropped around a common target pair.
        mutation_rate: each side is mutated at a rate uniform in [0, mutation_rate].
        indels: expected inserted or deleted runs per hundred residues and side.
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
    ) -> None:
        if not families:
            raise ValueError("no training family: every family was held out, or none has two sequences")
        self.families, self.size, self.cells, self.cap = list(families), size, cells, cap
        self.mutation_rate, self.indels, self.seed = mutation_rate, indels, seed
        weights = np.sqrt([len(family.sequences) for family in families])
        self._probabilities = weights / weights.sum()

    def batch(self, step: int) -> Batch:
        """The batch of one step."""
        rng = np.random.default_rng([self.seed, step])
        drawn = sorted((self._draw(rng) for _ in range(3 * self.size)), key=lambda p: len(p.query) + len(p.key))
        start = int(rng.integers(len(drawn) - self.size + 1))
        kept = drawn[start : start + self.size]
        largest = max(len(pair.query) for pair in kept) * max(len(pair.key) for pair in kept)
        return collate(kept[: max(1, self.cells // largest)])

    def _draw(self, rng: np.random.Generator) -> Pair:
        for _ in range(1000):
            family = self.families[rng.choice(len(self.families), p=self._probabilities)]
            first, second = rng.choice(len(family.sequences), 2, replace=False)
            pair = insert_and_delete(make_pair(family, int(first), int(second)), self.indels, rng)
            pair = crop_pair(pair, self.cap, rng)
            if len(pair.target) >= 5:  # fewer are noise: two fragments that hardly overlap
                rates = rng.random(2) * self.mutation_rate
                return replace(pair, query=mutate(pair.query, rates[0], rng), key=mutate(pair.key, rates[1], rng))
        raise ValueError("1000 drawn pairs in a row share fewer than 5 aligned residues; is the data an alignment?")
