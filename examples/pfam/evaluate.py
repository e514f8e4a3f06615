"""Score a model and the baselines on fixed pairs, macro over families."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from .baselines import diagonal, needleman_wunsch, scaled_diagonal
from .decode import expected_accuracy
from .device import Device
from .metrics import (
    barycentre_error,
    hard_barycentre,
    macro,
    pair_score,
    plan_barycentre,
    reconstruction,
    sparse_cross_entropy,
)
from .model import Aligner
from .pairs import Pair
from .sampler import collate

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]
ALIGNED = ("precision", "recall", "f1", "barycentre")

BASELINES: dict[str, Callable[[Pair], IntArray]] = {
    "diagonal": lambda pair: diagonal(len(pair.query), len(pair.key)),
    "scaled diagonal": lambda pair: scaled_diagonal(len(pair.query), len(pair.key)),
    "Needleman-Wunsch": lambda pair: needleman_wunsch(pair.query, pair.key),
}


class Interrupted(Exception):
    """The user asked to stop while pairs were being scored."""


@dataclass(frozen=True)
class Scores:
    """Macro means, and the means of each family."""

    macro: dict[str, float]
    families: dict[str, dict[str, float]]


def score_baselines(pairs: Sequence[Pair]) -> dict[str, Scores]:
    """Precision, recall, F1 and barycentre error of every baseline."""
    scores = {}
    for name, align in BASELINES.items():
        rows = []
        for pair in pairs:
            predicted = align(pair)
            error = barycentre_error(hard_barycentre(predicted, len(pair.query), len(pair.key)), pair.target)
            rows.append((pair.family, {**asdict(pair_score(predicted, pair.target)), "barycentre": error}))
        scores[name] = Scores(*macro(rows))
    return scores


def score_model(
    model: Aligner,
    pairs: Sequence[Pair],
    threshold: float,
    batch_size: int = 8,
    progress: bool = True,
    stop: Callable[[], bool] = lambda: False,
    device: Device | None = None,
) -> Scores:
    """The same of the model's plans, with their reconstruction and sparse cross-entropy.

    ``device`` is where the model is. ``stop`` is asked between batches; once it says True, ``Interrupted`` is raised.
    """
    rows = []
    with tqdm(total=len(pairs), desc="evaluating", unit="pair", leave=False, disable=not progress) as bar:
        for pair, plan in align_pairs(model, pairs, batch_size, device):
            values = {
                **asdict(pair_score(expected_accuracy(plan, threshold), pair.target)),
                "barycentre": barycentre_error(plan_barycentre(plan), pair.target),
                "reconstruction": reconstruction(plan, pair.target),
                "sparse cross-entropy": sparse_cross_entropy(plan, pair.target),
            }
            rows.append((pair.family, values))
            bar.update()
            if stop():
                raise Interrupted
    return Scores(*macro(rows))


def align_pairs(
    model: Aligner, pairs: Sequence[Pair], batch_size: int, device: Device | None = None
) -> Iterator[tuple[Pair, FloatArray]]:
    """(pair, plan [n+1, m+1]) in order of length, so that batches hold little padding; the model's mode is kept."""
    device = device or Device()
    ordered = sorted(pairs, key=lambda pair: len(pair.query) + len(pair.key))
    training = model.training
    for start in range(0, len(ordered), batch_size):
        chunk = ordered[start : start + batch_size]
        model.eval()
        try:
            with torch.no_grad():
                batch = collate(chunk)
                longest = max(batch.query.shape[1], batch.key.shape[1])
                placed = device.place(batch, batch_size, longest, learning=False)
                plans = model(placed.batch)[1].cpu().double().numpy()[: len(chunk)]
        finally:
            model.train(training)
        for pair, plan in zip(chunk, plans, strict=True):
            yield pair, unpad(plan, len(pair.query), len(pair.key))


def unpad(plan: FloatArray, n: int, m: int) -> FloatArray:
    """[L+1, S+1] to [n+1, m+1]: the active rows and columns, and the dustbin, which stands after the padding."""
    rows, cols = [*range(n), plan.shape[0] - 1], [*range(m), plan.shape[1] - 1]
    return plan[np.ix_(rows, cols)]
