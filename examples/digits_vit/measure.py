"""What is said about a trained model: test score, time, size, and how evenly its patches are read."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from .data import Digits
from .train import History, Learner, Score, score


@dataclass(frozen=True)
class Outcome:
    """One attention and one seed; ``reading`` [n, heads, 16] is what the patches of the test digits receive."""

    test: Score
    history: History
    parameters: int
    reading: Tensor

    @property
    def seconds(self) -> float:
        """Time of all training steps, without validation."""
        return sum(self.history.seconds)

    @property
    def milliseconds_per_step(self) -> float:
        """Median over the steps: others on the machine disturb it little."""
        return 1000 * median(self.history.seconds)


def measure(learner: Learner, test: Digits) -> Outcome:
    """Score a trained model on the test digits."""
    reading = received(attention_weights(learner, test.images))
    parameters = sum(p.numel() for p in learner.model.parameters())
    return Outcome(score(learner, test), learner.history, parameters, reading)


@torch.no_grad()
def attention_weights(learner: Learner, images: Tensor) -> Tensor:
    """The trained weights of every block on images [N, 8, 8]: [depth, N, heads, 17, 17], query by key; on the CPU."""
    learner.model.eval()
    return learner.model.attention_weights(images.to(learner.device)).cpu()


def received(weights: Tensor) -> Tensor:
    """Attention each patch receives in the first block, summed over the 17 queries: [N, heads, 16]; an even share is 1.

    The first block, because there every query counts; of the last one only the class token's output is used.
    """
    return weights[0].sum(-2)[..., 1:]


def class_token_view(weights: Tensor) -> Tensor:
    """Where the class token looks in the last block: its weight on each patch, [N, heads, 16]."""
    return weights[-1][:, :, 0, 1:]


def first_of_each_class(digits: Digits, count: int) -> Digits:
    """The first digit of each of the first ``count`` classes: for pictures that nobody has picked."""
    first = torch.stack([(digits.labels == label).nonzero()[0, 0] for label in range(count)])
    return Digits(digits.images[first], digits.labels[first], digits.positions[first])
