"""Scoring and training: the same two functions for softmax, for Sinkhorn and for the control."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from .data import Crop, Split, batches, training_batches

CLIP = 1.0


@dataclass(frozen=True)
class Score:
    """On the test crops: share of right answers, mean cross-entropy, wall-clock seconds of the evaluation."""

    accuracy: float
    loss: float
    seconds: float


@dataclass
class Curve:
    """A training run: loss of every step, test score at (step, score), seconds of training alone."""

    losses: list[float] = field(default_factory=list)
    scores: list[tuple[int, Score]] = field(default_factory=list)
    seconds: float = 0.0


def device_of(model: nn.Module) -> torch.device:
    """Where it computes."""
    return next(model.parameters()).device


@torch.no_grad()
def evaluate(model: nn.Module, crops: Sequence[Crop]) -> Score:
    """Score a model in evaluation mode, without gradients, on padded batches; its training flag is put back."""
    training = model.training
    model.eval()
    began, right, loss = time.perf_counter(), 0, 0.0
    for batch in batches(crops):
        batch = batch.to(device_of(model))
        logits = model(batch.tokens, batch.padding)
        right += int((logits.argmax(-1) == batch.families).sum())
        loss += float(F.cross_entropy(logits, batch.families, reduction="sum"))
    seconds = time.perf_counter() - began
    model.train(training)
    return Score(right / len(crops), loss / len(crops), seconds)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    split: Split,
    crops: Sequence[Crop],
    *,
    epochs: int,
    seed: int,
    text: str,
    evaluate_every: int = 1,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    before: Score | None = None,
    progress: bool = True,
) -> Curve:
    """Train on fresh random crops; the batches are a function of the seed, so runs can be compared step by step.

    The curve has the score before (evaluated here unless given), after every `evaluate_every` epochs and at the end.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    torch.manual_seed(seed)  # dropout
    curve = Curve(scores=[(0, before or evaluate(model, crops))])
    model.train()
    with tqdm(total=epochs, desc=text, unit="epoch", disable=not progress) as bar:
        for epoch in range(epochs):
            began = time.perf_counter()
            for batch in training_batches(split, seed, epoch):
                batch = batch.to(device_of(model))
                loss = F.cross_entropy(model(batch.tokens, batch.padding), batch.families)
                if not torch.isfinite(loss):
                    raise FloatingPointError(f"{text}: the loss is {loss.item()} in epoch {epoch + 1}")
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                curve.losses.append(loss.item())
            curve.seconds += time.perf_counter() - began
            if (epoch + 1) % evaluate_every == 0 or epoch + 1 == epochs:
                curve.scores.append((len(curve.losses), evaluate(model, crops)))
            score = curve.scores[-1][1]
            bar.set_postfix_str(f"loss {curve.losses[-1]:.3f}, test accuracy {score.accuracy:.3f}")
            bar.update()
    return curve
