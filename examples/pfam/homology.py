"""How well an aligner tells related proteins from unrelated ones, and what is fitted so that it says how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from .decode import DECODERS, DEFAULT_DECODER, confidence
from .evaluate import aligned
from .flanks import TESTS, flanked, unrelated
from .model import Aligner
from .pairs import Family, Pair, evaluation_pairs
from .release import TrainedAligner
from .verdict import Verdict, features, fit

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]

_A_FAMILY, _CAP = 12, 250
_SEED = 17
_BATCH = 8


def pair_features(model: Aligner, pairs: Sequence[Pair], progress: bool = False) -> FloatArray:
    """``verdict.features`` of every pair, [pairs, 5], in their order.

    Raises:
        ValueError: the aligner has no pair HMM.
    """
    if model.runs is None:
        raise ValueError("homology is judged by the pair HMM's odds, which an aligner with --gaps single has not")
    decode, found = DECODERS[DEFAULT_DECODER], {}
    numbered = [replace(pair, number=number) for number, pair in enumerate(pairs)]
    for result in tqdm(aligned(model, numbered, _BATCH), "judging", len(pairs), leave=False, disable=not progress):
        assert result.log_odds is not None
        found[result.pair.number] = features(result.log_odds, result.plan, decode(result.plan))
    return np.stack([found[number] for number in range(len(pairs))])


def calibration_pairs(families: Sequence[Family], seed: int = _SEED) -> tuple[list[Pair], list[bool]]:
    """Pairs to learn from, and whether they are related: of families the whole domains and all flank tests in turn, and
    as many unrelated ones, which get the same flanks, so that their lengths tell nothing."""
    related = list(evaluation_pairs(families, _A_FAMILY, _CAP, seed).pairs)
    others = list(unrelated(families, len(related), _CAP, seed))
    tests, pairs = list(TESTS), []
    for group, drawn in ((0, related), (1, others)):
        for at, pair in enumerate(drawn):
            # Whole domains half of the time.
            test = tests[(at // 2) % len(tests)] if at % 2 else "none"
            pairs.append(flanked([pair], test, seed + 2 * at + group)[0])
    return pairs, [True] * len(related) + [False] * len(others)


def fitted(model: Aligner, families: Sequence[Family], progress: bool = False) -> Verdict:
    """The verdict of a model, fitted on families that it was not trained on."""
    pairs, related = calibration_pairs(families)
    return fit(list(pair_features(model, pairs, progress)), related)


@dataclass(frozen=True)
class Judged:
    """A pair as an aligner sees it: decoded pairs [p, 2] and their confidence, probability of homology, log odds."""

    pair: Pair
    decoded: IntArray
    confidence: FloatArray
    probability: float
    log_odds: float


def homology(aligner: TrainedAligner, log_odds: float, plan: FloatArray, decoded: IntArray, decoder: str) -> float:
    """The verdict's probability. It was fitted on what the default rule decodes, and that is what it is asked about."""
    by_default = decoded if decoder == DEFAULT_DECODER else DECODERS[DEFAULT_DECODER](plan)
    return aligner.verdict.probability(log_odds, plan, by_default)


def judge(
    aligner: TrainedAligner, pairs: Sequence[Pair], progress: bool = False, decoder: str = DEFAULT_DECODER
) -> list[Judged]:
    """Every pair, in their order."""
    decode, found = DECODERS[decoder], {}
    numbered = [replace(pair, number=number) for number, pair in enumerate(pairs)]
    results = aligned(aligner.model, numbered, _BATCH)
    for one in tqdm(results, "aligning", len(pairs), leave=False, disable=not progress):
        decoded, log_odds = decode(one.plan), one.log_odds if one.log_odds is not None else 0.0
        probability = homology(aligner, log_odds, one.plan, decoded, decoder)
        found[one.pair.number] = Judged(one.pair, decoded, confidence(one.plan, decoded), probability, log_odds)
    return [found[number] for number in range(len(pairs))]
