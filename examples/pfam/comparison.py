"""Models beside the baselines, on the same pairs in one run."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from tqdm import tqdm

from .calibration import Calibration, Predictor, certificates, predictor
from .decode import DECODERS, DEFAULT_DECODER, Decoder
from .device import Device
from .evaluate import FloatArray, Result, align_pairs, baseline_results, measure_alignment, measure_plan
from .fixed_score import FixedScores, pair_hmm_plan
from .model import Aligner
from .pairs import Pair

FIXED_SCORES, PAIR_HMM = "fixed-score Sinkhorn", "pair HMM, nothing trained"
REFERENCE = "Needleman-Wunsch"
"""The baseline beside the models in every table."""
REFERENCES = (REFERENCE, PAIR_HMM)
"""The baselines that differences are taken from."""
CONFIDENCE = "1 - mean P of the decoded pairs"
BATCH = 8
CERTIFIED = 400
"""At most so many pairs get certificates, evenly spread: each is one more solve."""


@dataclass(frozen=True)
class Doubts:
    """Of some pairs, numbers that are known without the answer and should grow with the error, and how they do."""

    results: list[Result]
    numbers: dict[str, list[float]]

    @cached_property
    def predictors(self) -> dict[str, Predictor]:
        """How well each number orders the pairs by their error."""
        return {name: predictor(self.results, numbers) for name, numbers in self.numbers.items()}


@dataclass
class Comparison:
    """Results by aligner, in the order of the tables.

    Of those that make plans also the results of every decoder by its name, and the calibration; of models, the doubts.
    """

    results: dict[str, list[Result]] = field(default_factory=dict)
    decoded: dict[str, dict[str, list[Result]]] = field(default_factory=dict)
    calibration: dict[str, Calibration] = field(default_factory=dict)
    doubts: dict[str, Doubts] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """The names of the trained ones."""
        return list(self.doubts)

    def add_plans(
        self, name: str, plans: Iterable[tuple[Pair, FloatArray]], total: int, decode: Decoder, progress: bool
    ) -> None:
        """Measure plans [n+1, m+1] as they come; none is kept."""
        results, calibration = [], Calibration()
        decoded: dict[str, list[Result]] = {rule: [] for rule in DECODERS}
        for pair, plan in tqdm(plans, name, total, leave=False, disable=not progress):
            predicted = decode(plan)
            results.append(measure_plan(pair, plan, predicted))
            calibration.add(pair, plan, predicted)
            for rule, found in decoded.items():
                found.append(measure_alignment(pair, DECODERS[rule](plan)))
        self.results[name], self.calibration[name], self.decoded[name] = results, calibration, decoded


def compare(
    models: Mapping[str, Aligner],
    pairs: Sequence[Pair],
    decoder: str = DEFAULT_DECODER,
    device: Device | None = None,
    progress: bool = True,
) -> Comparison:
    """Align every pair with every baseline and every model.

    Args:
        models: by the name of their row, on the CPU; a copy is moved to ``device``.
        decoder: a name in ``DECODERS``, for every plan.

    Raises:
        ValueError: no such decoder, or no pair.
    """
    if decoder not in DECODERS:
        raise ValueError(f"no decoder is named {decoder!r}; take one of {', '.join(DECODERS)}")
    if not pairs:
        raise ValueError("no pair to evaluate on: all too long, or with no column in upper case in both; raise the cap")
    pairs = [replace(pair, number=number) for number, pair in enumerate(pairs)]
    decode, fixed = DECODERS[decoder], FixedScores()
    comparison = Comparison(baseline_results(pairs, progress))
    for name, plan in ((FIXED_SCORES, fixed.plan), (PAIR_HMM, pair_hmm_plan)):
        comparison.add_plans(name, ((pair, plan(pair)) for pair in pairs), len(pairs), decode, progress)
    for name, model in models.items():
        placed = copy.deepcopy(model)
        if device is not None:
            device.model(placed)
        comparison.add_plans(name, align_pairs(placed, pairs, BATCH, device), len(pairs), decode, progress)
        comparison.doubts[name] = _doubts(model, pairs, comparison.results[name], name, progress)
    return comparison


def _doubts(model: Aligner, pairs: Sequence[Pair], results: Sequence[Result], name: str, progress: bool) -> Doubts:
    known = {result.number: result for result in results}
    chosen = pairs[:: -(-len(pairs) // CERTIFIED)]
    found = [known[pair.number] for pair in chosen]
    numbers: dict[str, list[float]] = {CONFIDENCE: [1 - result.values["confidence"] for result in found]}
    if model.config.attention != "sinkhorn":  # no transport problem is solved, so there is nothing to certify
        return Doubts(found, numbers)
    for pair in tqdm(chosen, f"certifying {name}", leave=False, disable=not progress):
        for label, number in certificates(model, pair).items():
            numbers.setdefault(label, []).append(number)
    return Doubts(found, numbers)
