"""Crops of Pfam sequences, labelled with their family: split by protein, ragged, padded on the right.

A token is a residue code of `examples.pfam.pairs.ALPHABET`, or `START`, which opens every crop, or `PADDING`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from examples.pfam.config import HELDOUT_SAMPLE, TRAIN_SAMPLE
from examples.pfam.pairs import ALPHABET, Chain, IntArray, load_families
from examples.pfam.stockholm import read_stockholm

START, PADDING = len(ALPHABET), len(ALPHABET) + 1
TOKENS = len(ALPHABET) + 2
SHORTEST, LONGEST = 20, 48  # residues in a crop
MIN_PROTEINS = 7  # smaller families cannot be split
TEST_SHARE = 0.35
TEST_CROPS = 100  # of each family
EPOCH_CROPS = 64  # of each family
BATCH = 64
# Not the run's seed: runs that differ in their seed are compared on the same split and the same test crops.
_SPLIT_SEED, _TEST_SEED = 0, 1


class Crop(NamedTuple):
    """Residue codes [n], the index of the family, and the sequence it was cut from."""

    residues: IntArray
    family: int
    name: str


class Batch(NamedTuple):
    """Tokens [N, L] and their padding [N, L] (True = padding), families [N]; L is the longest crop plus `START`."""

    tokens: Tensor
    padding: Tensor
    families: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch there."""
        return Batch(*(x.to(device) for x in self))


@dataclass(frozen=True)
class Split:
    """`train[f]` and `test[f]` are the sequences of family `names[f]`; no protein gives sequences to both."""

    names: tuple[str, ...]
    train: tuple[tuple[Chain, ...], ...]
    test: tuple[tuple[Chain, ...], ...]

    def summary(self) -> str:
        """What there is to learn and to test, in a line."""
        train, test = (sum(map(len, part)) for part in (self.train, self.test))
        return f"{len(self.names)} families, {train} training and {test} test sequences: {', '.join(self.names)}"


def load_split() -> Split:
    """The families of the shipped Pfam sample with enough proteins, each split by protein; always the same."""
    families = [family for path in (TRAIN_SAMPLE, HELDOUT_SAMPLE) for family in load_families(read_stockholm(path))]
    names: list[str] = []
    parts: list[tuple[tuple[Chain, ...], tuple[Chain, ...]]] = []
    for family in families:
        proteins = sorted({protein(chain.name) for chain in family.sequences})
        if len(proteins) < MIN_PROTEINS:
            continue
        order = np.random.default_rng([_SPLIT_SEED, len(names)]).permutation(len(proteins))
        held_out = {proteins[index] for index in order[: round(TEST_SHARE * len(proteins))]}
        names.append(family.name)
        train = tuple(chain for chain in family.sequences if protein(chain.name) not in held_out)
        parts.append((train, tuple(chain for chain in family.sequences if protein(chain.name) in held_out)))
    return Split(tuple(names), tuple(train for train, _ in parts), tuple(test for _, test in parts))


def protein(name: str) -> str:
    """LAR_DROME/418-503 is a piece of the protein LAR_DROME."""
    return name.split("/")[0]


def heldout_crops(split: Split, per_family: int = TEST_CROPS) -> list[Crop]:
    """The crops that every stage is scored on: as many of each family, so that guessing scores 1 / families."""
    return _draw(split.test, per_family, np.random.default_rng(_TEST_SEED))


def training_batches(split: Split, seed: int, epoch: int) -> Iterator[Batch]:
    """An epoch of fresh random crops, families balanced; a function of (seed, epoch)."""
    rng = np.random.default_rng([seed, epoch])
    crops = _draw(split.train, EPOCH_CROPS, rng)
    order = rng.permutation(len(crops))
    yield from batches([crops[index] for index in order])


def batches(crops: Sequence[Crop], size: int = BATCH) -> Iterator[Batch]:
    """Consecutive crops, padded to the longest of each batch."""
    for first in range(0, len(crops), size):
        yield collate(crops[first : first + size])


def collate(crops: Sequence[Crop]) -> Batch:
    """Pad crops on the right, as nn.TransformerEncoder needs it for its nested tensors."""
    tokens = torch.full((len(crops), 1 + max(len(crop.residues) for crop in crops)), PADDING)
    tokens[:, 0] = START
    for row, crop in zip(tokens, crops):
        row[1 : 1 + len(crop.residues)] = torch.from_numpy(crop.residues)
    return Batch(tokens, tokens == PADDING, torch.tensor([crop.family for crop in crops]))


def _draw(families: Sequence[Sequence[Chain]], per_family: int, rng: np.random.Generator) -> list[Crop]:
    """Random windows; the sequences of a family take turns."""
    crops = []
    for family, chains in enumerate(families):
        order = rng.permutation(len(chains))
        for turn in range(per_family):
            chain = chains[order[turn % len(chains)]]
            length = min(int(rng.integers(SHORTEST, LONGEST + 1)), len(chain))
            start = int(rng.integers(len(chain) - length + 1))
            crops.append(Crop(chain.residues[start : start + length].astype(np.int64), family, chain.name))
    return crops
