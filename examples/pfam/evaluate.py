"""Score alignments and plans on fixed pairs, pair by pair, and macro over families."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from examples.common.text import clip

from .baselines import diagonal, needleman_wunsch, scaled_diagonal, smith_waterman
from .decode import DECODERS, DEFAULT_DECODER, confidence
from .device import Device
from .encodings import Encodings
from .metrics import (
    PairScore,
    barycentre_error,
    best_partners,
    hard_barycentre,
    macro,
    pair_score,
    partners,
    plan_barycentre,
    reconstruction,
    row_accuracy,
    sequence_identity,
    sparse_cross_entropy,
)
from .model import Aligner
from .pairs import Pair
from .sampler import collate

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]

ALIGNED = ("precision", "recall", "f1", "row accuracy", "barycentre")
"""What is measured of every aligner."""
PLAN = ("reconstruction", "sparse cross-entropy", "confidence")
"""What is measured of plans alone; confidence is the mean entry of the decoded pairs."""

CELLS = 640_000
"""Most plan entries that are computed at once: more take memory and are no faster."""

BASELINES: dict[str, Callable[[Pair], IntArray]] = {
    "diagonal": lambda pair: diagonal(len(pair.query), len(pair.key)),
    "scaled diagonal": lambda pair: scaled_diagonal(len(pair.query), len(pair.key)),
    "Needleman-Wunsch": lambda pair: needleman_wunsch(pair.query, pair.key),
    "Smith-Waterman": lambda pair: smith_waterman(pair.query, pair.key),
}


@dataclass(frozen=True)
class Aligned:
    """A pair, its plan [n+1, m+1], and the pair HMM's log odds that there is anything to align; None without one."""

    pair: Pair
    plan: FloatArray
    log_odds: float | None


class Interrupted(Exception):
    """The user asked to stop while pairs were being scored."""


@dataclass(frozen=True)
class Result:
    """One aligned pair: its family and names, its identity in the reference, its counts, and the values by name.

    ``number`` is the pair's.
    """

    family: str
    names: tuple[str, str]
    identity: float
    counts: PairScore
    values: dict[str, float]
    number: int = 0


@dataclass(frozen=True)
class Scores:
    """Macro means, and the means of each family."""

    macro: dict[str, float]
    families: dict[str, dict[str, float]]

    @classmethod
    def of(cls, results: Iterable[Result]) -> Scores:
        """The means of pair by pair results."""
        return cls(*macro((result.family, result.values) for result in results))


def measure_alignment(pair: Pair, predicted: IntArray) -> Result:
    """``ALIGNED`` of residue pairs [p, 2]."""
    n, m = len(pair.query), len(pair.key)
    barycentre = barycentre_error(hard_barycentre(predicted, n, m), pair.target)
    return _result(pair, predicted, row_accuracy(partners(predicted, n, m), pair.target), barycentre)


def measure_plan(pair: Pair, plan: FloatArray, predicted: IntArray) -> Result:
    """``ALIGNED`` and ``PLAN`` of a plan [n+1, m+1] and the pairs [p, 2] decoded from it.

    Row accuracy and barycentre are the plan's own, before decoding.
    """
    barycentre = barycentre_error(plan_barycentre(plan), pair.target)
    result = _result(pair, predicted, row_accuracy(best_partners(plan), pair.target), barycentre)
    result.values.update(
        {
            "reconstruction": reconstruction(plan, pair.target),
            "sparse cross-entropy": sparse_cross_entropy(plan, pair.target),
            "confidence": float(confidence(plan, predicted).mean()) if len(predicted) else 0.0,
        }
    )
    return result


def _result(pair: Pair, predicted: IntArray, accuracy: float, barycentre: float) -> Result:
    counts = pair_score(predicted, pair.target)
    identity = sequence_identity(pair.query, pair.key, pair.target)
    numbers = (counts.precision, counts.recall, counts.f1, accuracy, barycentre)
    return Result(pair.family, pair.names, identity, counts, dict(zip(ALIGNED, numbers, strict=True)), pair.number)


def baseline_results(pairs: Sequence[Pair], progress: bool = False) -> dict[str, list[Result]]:
    """Every baseline of ``BASELINES`` on every pair, in the order of ``pairs``."""
    return {
        name: [measure_alignment(pair, align(pair)) for pair in tqdm(pairs, name, leave=False, disable=not progress)]
        for name, align in BASELINES.items()
    }


def score_baselines(pairs: Sequence[Pair]) -> dict[str, Scores]:
    """``ALIGNED`` of every baseline."""
    return {name: Scores.of(results) for name, results in baseline_results(pairs).items()}


def score_model(
    model: Aligner,
    pairs: Sequence[Pair],
    batch_size: int = 8,
    progress: bool = True,
    stop: Callable[[], bool] = lambda: False,
    device: Device | None = None,
) -> Scores:
    """``ALIGNED`` and ``PLAN`` of the model's plans, decoded by the default rule.

    ``device`` is where the model is. ``stop`` is asked between pairs; once it says True, ``Interrupted`` is raised.
    """
    results, decode = [], DECODERS[DEFAULT_DECODER]
    with tqdm(total=len(pairs), desc="evaluating", unit="pair", leave=False, disable=not progress) as bar:
        for pair, plan in align_pairs(model, pairs, batch_size, device):
            results.append(measure_plan(pair, plan, decode(plan)))
            bar.update()
            if stop():
                raise Interrupted
    return Scores.of(results)


def align_pairs(
    model: Aligner, pairs: Sequence[Pair], batch_size: int, device: Device | None = None
) -> Iterator[tuple[Pair, FloatArray]]:
    """(pair, plan [n+1, m+1]) of ``aligned``."""
    for found in aligned(model, pairs, batch_size, device):
        yield found.pair, found.plan


def aligned(
    model: Aligner,
    pairs: Sequence[Pair],
    batch_size: int,
    device: Device | None = None,
    known: Encodings | None = None,
) -> Iterator[Aligned]:
    """The pairs in order of length, so that batches hold little padding; whether the model is training is kept.

    A batch is smaller than ``batch_size`` where its plans would have more than ``CELLS`` entries. On the CPU a sequence
    of several pairs is encoded once, and those in ``known``, of the same weights, not again.

    Raises:
        FloatingPointError: a plan is not finite, as of a model that has diverged, or was never trained.
    """
    device = device or Device()
    training = model.training
    known = (known or Encodings()) if device.name == "cpu" else None
    for chunk in _batches(sorted(pairs, key=lambda pair: len(pair.query) + len(pair.key)), batch_size):
        model.eval()
        try:
            with torch.no_grad():
                batch = collate(chunk)
                longest = max(batch.query.shape[1], batch.key.shape[1])
                placed = device.place(batch, batch_size, longest, learning=False)
                output = model(placed.batch, known)
                plans = output.last.cpu().double().numpy()[: len(chunk)]
                odds = [None] * len(chunk) if output.log_odds is None else output.log_odds.tolist()[: len(chunk)]
        except ValueError as error:
            if "NaN" not in str(error):  # of scores that the model makes of its weights: pairs hold no NaN
                raise
            raise _diverged(chunk[0]) from error
        finally:
            model.train(training)
        for pair, plan, log_odds in zip(chunk, plans, odds, strict=True):
            real = unpad(plan, len(pair.query), len(pair.key))
            if not np.isfinite(real).all():
                raise _diverged(pair)
            yield Aligned(pair, real, log_odds)


def _diverged(pair: Pair) -> FloatingPointError:
    names = " and ".join(map(clip, pair.names))
    return FloatingPointError(
        f"the aligner's plan of {names} is not finite: its weights are those of a run that diverged"
    )


def _batches(ordered: Sequence[Pair], size: int) -> Iterator[list[Pair]]:
    chunk: list[Pair] = []
    rows = cols = 0
    for pair in ordered:
        rows, cols = max(rows, len(pair.query)), max(cols, len(pair.key))
        if chunk and (len(chunk) == size or rows * cols * (len(chunk) + 1) > CELLS):
            yield chunk
            chunk, rows, cols = [], len(pair.query), len(pair.key)
        chunk.append(pair)
    if chunk:
        yield chunk


def unpad(plan: FloatArray, n: int, m: int) -> FloatArray:
    """[L+1, S+1] to [n+1, m+1]: the active rows and columns, and the dustbin, which stands after the padding."""
    if plan.shape == (n + 1, m + 1):
        return plan
    found = np.empty((n + 1, m + 1), dtype=plan.dtype)
    found[:n, :m], found[:n, m] = plan[:n, :m], plan[:n, -1]
    found[n, :m], found[n, m] = plan[-1, :m], plan[-1, -1]
    return found
