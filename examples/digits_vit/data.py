"""The digits of scikit-learn: a fixed split, patches, and shifts of one pixel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

SIDE, PATCH = 8, 2
GRID = SIDE // PATCH
CLASSES = 10

# Not the run's seed: all runs share one split.
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Digits:
    """Images [n, 8, 8] in [0, 1], 1 is ink; labels [n] in 0..9; and where they stand in scikit-learn's set, [n]."""

    images: Tensor
    labels: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Digits:
        """The same digits there."""
        return Digits(self.images.to(device), self.labels.to(device), self.positions.to(device))


@dataclass(frozen=True)
class Split:
    """60 % to train on, 15 % to watch and choose settings with, 25 % to be scored once."""

    train: Digits
    validation: Digits
    test: Digits

    def summary(self) -> str:
        """The sizes, in one line."""
        return f"digits: {len(self.train)} to train on, {len(self.validation)} to validate, {len(self.test)} to test"


def load_split() -> Split:
    """scikit-learn's 1797 digits, each class split in the same proportions."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target, dtype=torch.int64)

    def divide(pool: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
        kept, taken = train_test_split(pool, test_size=share, stratify=digits.target[pool], random_state=_SPLIT_SEED)
        return kept, taken

    rest, test = divide(np.arange(len(labels)), 0.25)
    train, validation = divide(rest, 0.2)
    return Split(*(Digits(images[part], labels[part], torch.tensor(part)) for part in (train, validation, test)))


def to_patches(images: Tensor) -> Tensor:
    """[N, 8, 8] to [N, 16, 4]: the 2 x 2 patches, row by row."""
    return F.unfold(images[:, None], PATCH, stride=PATCH).transpose(1, 2)


def to_grid(values: Tensor) -> Tensor:
    """[..., 16], a number per patch, to [..., 4, 4], its place in the image."""
    return values.unflatten(-1, (GRID, GRID))


def shift(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Move each image [N, 8, 8], with this probability, by -1, 0 or 1 pixels each way; what comes in is blank."""
    num = len(images)
    corner = torch.randint(3, (num, 2), generator=generator)
    corner[torch.rand(num, generator=generator) >= probability] = 1
    windows = F.pad(images, (1, 1, 1, 1)).unfold(1, SIDE, 1).unfold(2, SIDE, 1)  # [N, 3, 3, 8, 8]
    return windows[torch.arange(num), corner[:, 0], corner[:, 1]]
