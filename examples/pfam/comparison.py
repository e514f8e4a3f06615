"""Models beside the baselines, on the same pairs in one run."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .calibration import Calibration, Predictor, certificates, predictor
from .decode import DECODERS, DEFAULT_DECODER, Decoder
from .device import Device
from .evaluate import BASELINES, FloatArray, Result, align_pairs, measure_alignment, measure_plan
from .fixed_score import FixedScores, pair_hmm_plan
from .model import Aligner
from .pairs import Pair
from .program_results import ProgramResults, align_program, remembered
from .programs import TIMEOUT, Installed
from .seconds import Seconds

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
    ``seconds`` is what each took for all pairs, without what measures them; ``programs``
    are the names of the installed ones, ``notes`` what befell them.
    """

    results: dict[str, list[Result]] = field(default_factory=dict)
    decoded: dict[str, dict[str, list[Result]]] = field(default_factory=dict)
    calibration: dict[str, Calibration] = field(default_factory=dict)
    doubts: dict[str, Doubts] = field(default_factory=dict)
    seconds: dict[str, Seconds] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    programs: list[str] = field(default_factory=list)

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
        self.seconds[name] = Seconds()
        for pair, plan in tqdm(self._timed(name, plans), name, total, leave=False, disable=not progress):
            start = Seconds.now()
            predicted = decode(plan)
            self.seconds[name] = self.seconds[name].since(start)
            results.append(measure_plan(pair, plan, predicted))
            calibration.add(pair, plan, predicted)
            for rule, found in decoded.items():
                found.append(measure_alignment(pair, DECODERS[rule](plan)))
        self.results[name], self.calibration[name], self.decoded[name] = results, calibration, decoded

    def _timed(self, name: str, plans: Iterable[tuple[Pair, FloatArray]]) -> Iterator[tuple[Pair, FloatArray]]:
        iterator, done = iter(plans), object()
        while True:
            start = Seconds.now()
            found: Any = next(iterator, done)
            self.seconds[name] = self.seconds[name].since(start)
            if found is done:
                return
            yield found

    def add_baselines(self, pairs: Sequence[Pair], progress: bool) -> None:
        """Every one of ``BASELINES``."""
        for name, align in BASELINES.items():
            start = Seconds.now()
            found = [align(pair) for pair in tqdm(pairs, name, leave=False, disable=not progress)]
            self.seconds[name] = Seconds().since(start)
            self.results[name] = [measure_alignment(pair, aligned) for pair, aligned in zip(pairs, found, strict=True)]

    def add_program(
        self, program: Installed, pairs: Sequence[Pair], timeout: float, progress: bool, kept: Path | None
    ) -> None:
        """An installed program; one that fails too often is left out, with a note. ``kept`` is of
        ``program_results.remembered``."""

        def run() -> ProgramResults:
            with tqdm(total=len(pairs), desc=program.label, leave=False, disable=not progress) as bar:
                return align_program(program, pairs, timeout, Seconds.now, bar.update)

        results = remembered(kept, program, pairs, timeout, run)
        failures = results.failures
        if results.found is None:
            self.notes.append(f"{program.label} is left out after {failures.count} failures; {failures.first}")
            return
        if failures.count:
            text = f"failed on {failures.count} of {len(pairs)} pairs, which count as nothing aligned"
            self.notes.append(f"{program.label} {text}; {failures.first}")
        self.programs.append(program.label)
        self.seconds[program.label] = Seconds(*results.seconds)
        self.results[program.label] = [measure_alignment(*both) for both in zip(pairs, results.found, strict=True)]


def compare(
    models: Mapping[str, Aligner],
    pairs: Sequence[Pair],
    decoder: str = DEFAULT_DECODER,
    device: Device | None = None,
    progress: bool = True,
    programs: Sequence[Installed] = (),
    timeout: float = TIMEOUT,
    program_results: Path | None = None,
) -> Comparison:
    """Align every pair with every baseline, every installed program and every model.

    Args:
        models: by the name of their row, on the CPU; a copy is moved to ``device``.
        decoder: a name in ``DECODERS``, for every plan.
        programs: see ``programs.find``; ``timeout`` is what each may take over a pair, in seconds; ``program_results``
            the file of what they found before, see ``program_results.remembered``.

    Raises:
        ValueError: no such decoder, or no pair.
    """
    if decoder not in DECODERS:
        raise ValueError(f"no decoder is named {decoder!r}; take one of {', '.join(DECODERS)}")
    if not pairs:
        raise ValueError("no pair to evaluate on: all too long, or with no column in upper case in both; raise the cap")
    pairs = [replace(pair, number=number) for number, pair in enumerate(pairs)]
    decode, fixed = DECODERS[decoder], FixedScores()
    comparison = Comparison()
    comparison.add_baselines(pairs, progress)
    for program in programs:
        comparison.add_program(program, pairs, timeout, progress, program_results)
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
