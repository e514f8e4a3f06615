"""Train the models of one seed side by side: same initial weights, batches and schedule, step by step in turn."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .data import Digits, Split, shift
from .model import VisionTransformer, attentions, build
from .settings import Settings

CPU = torch.device("cpu")
_WEIGHT_DECAY, _WARMUP, _SHIFTED = 0.1, 50, 0.3


@dataclass(frozen=True)
class Score:
    """Share of right answers, and cross-entropy."""

    accuracy: float
    loss: float


@dataclass
class History:
    """Of one model: loss and seconds of every training step; after every epoch the validation score."""

    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    validation: list[Score] = field(default_factory=list)


class Learner:
    """A model with its optimizer and its history. Weights, batches and shifts are drawn on the CPU, so they are the
    same wherever it computes."""

    def __init__(self, model: VisionTransformer, device: torch.device = CPU) -> None:
        self.model, self.history, self.device = model.to(device), History(), device
        self.optimizer = torch.optim.AdamW(model.parameters(), weight_decay=_WEIGHT_DECAY)

    def step(self, images: Tensor, labels: Tensor, rate: float) -> None:
        """One step of AdamW on images [N, 8, 8] and labels [N]; only this is timed."""
        began = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        loss = F.cross_entropy(self.model(images.to(self.device)), labels.to(self.device))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.history.loss.append(loss.item())
        self.history.seconds.append(time.perf_counter() - began)
        if not math.isfinite(self.history.loss[-1]):
            raise FloatingPointError(f"the loss is {self.history.loss[-1]}; lower --learning-rate")


def steps_per_epoch(settings: Settings, split: Split) -> int:
    return math.ceil(len(split.train) / settings.batch_size)


def warm_up(settings: Settings, split: Split, device: torch.device = CPU) -> None:
    """A step of every attention that counts nowhere: the first one in a process takes a second more."""
    for attention in attentions(settings).values():
        Learner(build(attention, 0), device).step(split.train.images[:64], split.train.labels[:64], 0.0)


def train(settings: Settings, split: Split, seed: int, bar: tqdm, device: torch.device = CPU) -> dict[str, Learner]:
    """Train one model per attention, by name; ``bar`` moves by one whenever all have made a step."""
    learners = {name: Learner(build(attention, seed), device) for name, attention in attentions(settings).items()}
    total = settings.epochs * steps_per_epoch(settings, split)
    generator = torch.Generator().manual_seed(seed)
    step = 0
    for _ in range(settings.epochs):
        for images, labels in batches(split.train, settings.batch_size, generator):
            rate = learning_rate(settings.learning_rate, step, total)
            for learner in learners.values():
                learner.step(images, labels, rate)
            step += 1
            bar.update()
        for learner in learners.values():
            learner.history.validation.append(score(learner, split.validation))
        latest = {name: learner.history.validation[-1].accuracy for name, learner in learners.items()}
        bar.set_postfix_str(", ".join(f"{name} {accuracy:.1%}" for name, accuracy in latest.items()))
    return learners


def batches(digits: Digits, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order, some images shifted: images [N, 8, 8], labels [N]; the last batch may be smaller."""
    for chosen in torch.randperm(len(digits), generator=generator).split(size):
        yield shift(digits.images[chosen], _SHIFTED, generator), digits.labels[chosen]


def learning_rate(peak: float, step: int, total: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    return peak * min(1.0, (step + 1) / _WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / total))


@torch.no_grad()
def score(learner: Learner, digits: Digits) -> Score:
    """Accuracy and cross-entropy on all of ``digits``."""
    digits = digits.to(learner.device)
    learner.model.eval()
    scores = learner.model(digits.images)
    accuracy = (scores.argmax(1) == digits.labels).double().mean().item()
    return Score(accuracy, F.cross_entropy(scores, digits.labels).item())
