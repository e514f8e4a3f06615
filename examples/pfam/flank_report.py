"""Aligners between flanks and on unrelated pairs, in tables and figures: F1, whether confidences are right, and whether
related pairs are told from unrelated ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from examples.common.tables import table

from .baselines import needleman_wunsch, smith_waterman
from .calibration import Reliability
from .decode import DECODERS, DEFAULT_DECODER
from .evaluate import Result, Scores
from .fixed_score import pair_hmm_plan
from .flanks import TESTS, UNRELATED, Align, area, flank_results, unrelated
from .homology import Judged, judge
from .metrics import sequence_identity
from .pairs import Family, IntArray, Pair, evaluation_pairs
from .program_results import align_program, remembered
from .programs import TIMEOUT, Installed
from .release import TrainedAligner
from .runs import BEGINNINGS
from .seconds import Seconds
from .summary import Interval, differences, summarise

CAP = 250
"""Longest domain that is set between flanks, unless told otherwise."""
LOW = 0.2
"""Identity up to which pairs are remote."""


class NoFlankTest(ValueError):
    """The families have no pair for it, or none that is unrelated."""


def _pair_hmm(pair: Pair, decoder: str) -> IntArray:
    begun = BEGINNINGS["fitted"]
    plan = pair_hmm_plan(pair, replace(begun.costs, pair=-begun.offset), begun.gain)
    return DECODERS[decoder](plan)


BASELINES = {
    "Needleman-Wunsch": lambda pair, _: needleman_wunsch(pair.query, pair.key),
    "Smith-Waterman": lambda pair, _: smith_waterman(pair.query, pair.key),
    "pair HMM, free ends": _pair_hmm,
}
"""What a pair is aligned by, nothing of it trained; plans by the decoder."""


@dataclass(frozen=True)
class Relatedness:
    """What one aligner says of ``judged`` related pairs, by the flank test, and of ``others``, which are not; ``low``
    are the related ones of an identity up to ``LOW``."""

    judged: Mapping[str, Sequence[Judged]]
    others: Sequence[Judged]
    low: Sequence[bool]

    @property
    def confidences(self) -> dict[str, Reliability]:
        """Of the decoded pairs of each test, of the unrelated ones and of all."""
        found, everything = {}, Reliability()
        for test, group in [*self.judged.items(), (UNRELATED, self.others)]:
            found[test] = Reliability()
            for one in group:
                true = np.isin(_coded(one.decoded), _coded(one.pair.target))
                for reliability in (found[test], everything):
                    reliability.add(one.confidence, true)
        return {**found, "all of them": everything}

    @property
    def areas(self) -> dict[str, dict[str, float | None]]:
        """Areas under the curve, related against unrelated, by test and by what tells them apart; None: no pair."""
        found: dict[str, dict[str, float | None]] = {}
        for test, group in self.judged.items():
            found[test] = {}
            for name in ("probability", "log_odds"):
                theirs = [getattr(one, name) for one in self.others]
                for at, chosen in (("", group), (f" <= {LOW}", [one for one, low in zip(group, self.low) if low])):
                    mine = [getattr(one, name) for one in chosen]
                    found[test][f"{name.replace('_', ' ')}{at}"] = area(mine, theirs) if mine and theirs else None
        return found

    @property
    def homology(self) -> Reliability:
        """Of the probability of homology, half of the pairs being related."""
        found = Reliability()
        for group in self.judged.values():
            for pairs, related in ((group, True), (self.others, False)):
                found.add(np.array([one.probability for one in pairs]), np.full(len(pairs), related))
        return found

    @property
    def refused(self) -> float:
        """The share of the unrelated pairs that have no common part."""
        return float(np.mean([one.probability < 0.5 for one in self.others]))

    @property
    def covered(self) -> float:
        """The share of the shorter sequence of unrelated pairs that is aligned."""
        return float(np.mean([len(one.decoded) / min(len(one.pair.query), len(one.pair.key)) for one in self.others]))

    def text(self, name: str) -> str:
        """Two tables and a line."""
        rows = []
        for of, found in self.confidences.items():
            count = max(found.count.sum(), 1.0)
            shares = (found.predicted.sum() / count, found.true.sum() / count, found.calibration_error)
            rows.append([of, f"{int(found.count.sum())}", *(f"{share:.3f}" for share in shares)])
        confidences = table([f"{name}: decoded pairs", "number", "say", "are right", "expected error"], rows)
        areas = self.areas
        heads = list(next(iter(areas.values())))
        rows = [[test, *("-" if x is None else f"{x:.3f}" for x in values.values())] for test, values in areas.items()]
        curves = table([f"{name}: area under the curve, related against unrelated", *heads], rows)
        line = (
            f"probability of homology: expected error {self.homology.calibration_error:.3f} where half are related; of "
            f"unrelated pairs {self.refused:.2f} have no common part, and {self.covered:.2f} of the shorter sequence "
            "is aligned"
        )
        return "\n\n".join([confidences, curves, line])

    @property
    def values(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "expected_error": {of: found.calibration_error for of, found in self.confidences.items()},
            "area_under_the_curve": self.areas,
            "homology_expected_error": self.homology.calibration_error,
            "unrelated_refused": self.refused,
            "unrelated_covered": self.covered,
        }


@dataclass
class FlankReport:
    """Results of every aligner by test, and what trained ones say of relatedness."""

    pairs: Sequence[Pair]
    results: dict[str, dict[str, list[Result]]] = field(default_factory=dict)
    relatedness: dict[str, Relatedness] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Every table."""
        head = f"{len(self.pairs)} pairs of {len({pair.family for pair in self.pairs})} families between flanks"
        rows = [
            [name, *(f"{Scores.of(found).macro['f1']:.3f}" for found in of_tests.values())]
            for name, of_tests in self.results.items()
        ]
        parts = [head, table(["F1 with flanks", *TESTS], rows)]
        if rows := self._differences():
            parts.append(table(["F1 with flanks, paired [95 %]", *TESTS], rows))
        parts += [one.text(name) for name, one in self.relatedness.items()]
        return "\n\n".join([*parts, *(f"note: {note}" for note in self.notes)])

    def _differences(self) -> list[list[str]]:
        rows = []
        for mine in self.relatedness:
            for theirs in self.results:
                if theirs in self.relatedness:
                    continue
                both = (self.results[mine], self.results[theirs])
                found = [differences(both[0][test], both[1][test])["f1"] for test in TESTS]
                rows.append([f"{mine} less {theirs}", *map(_signed, found)])
        return rows

    @property
    def values(self) -> dict[str, Any]:
        """For JSON."""
        scores = {
            name: {test: summarise(found).macro["f1"]._asdict() for test, found in of_tests.items()}
            for name, of_tests in self.results.items()
        }
        return {
            "pairs": len(self.pairs),
            "f1": scores,
            "relatedness": {name: one.values for name, one in self.relatedness.items()},
        }


def flank_report(
    aligners: Mapping[str, TrainedAligner],
    families: Sequence[Family],
    pairs: int,
    cap: int = CAP,
    seed: int = 0,
    progress: bool = True,
    programs: Sequence[Installed] = (),
    timeout: float = TIMEOUT,
    program_results: Path | None = None,
    decoder: str = DEFAULT_DECODER,
) -> FlankReport:
    """Every aligner on at most ``pairs`` pairs of each family, in every one of ``TESTS``; the trained ones on as many
    unrelated pairs too.

    Args:
        aligners: by the names of their rows, on the CPU.
        cap: pairs with a longer domain are left out.
        programs, timeout, program_results: see ``comparison.compare``.
        decoder: a name in ``DECODERS``, for every plan.

    Raises:
        NoFlankTest: no pair is so short, or there are no two families that are certainly not one.
    """
    chosen = evaluation_pairs(families, pairs, cap, seed)
    if not chosen.pairs:
        raise NoFlankTest(f"no pair of at most {cap} residues a side, with upper case in one column; raise the cap")
    try:
        others = unrelated(families, len(chosen.pairs), cap, seed)
    except ValueError as error:
        raise NoFlankTest(error) from error
    report = FlankReport(chosen.pairs)
    judged: dict[str, list[list[Judged]]] = {name: [] for name in aligners}

    def by_model(name: str) -> Align:
        def align(given: Sequence[Pair]) -> list[IntArray]:
            judged[name].append(judge(aligners[name], given, progress, decoder))
            return [one.decoded for one in judged[name][-1]]

        return align

    def by_baseline(name: str) -> Align:
        bar = {"desc": name, "leave": False, "disable": not progress}
        return lambda given: [BASELINES[name](pair, decoder) for pair in tqdm(given, **bar)]

    found = {name: by_baseline(name) for name in BASELINES} | {name: by_model(name) for name in aligners}
    report.results = flank_results(found, chosen.pairs, seed=seed)
    for program in programs:
        _add_program(report, program, seed, timeout, progress, program_results)
    low = [sequence_identity(pair.query, pair.key, pair.target) <= LOW for pair in chosen.pairs]
    for name, aligner in aligners.items():
        of_tests = dict(zip(TESTS, judged[name], strict=True))
        report.relatedness[name] = Relatedness(of_tests, judge(aligner, others, progress, decoder), low)
    return report


def _add_program(
    report: FlankReport, program: Installed, seed: int, timeout: float, progress: bool, kept: Path | None
) -> None:
    def align(given: Sequence[Pair]) -> list[IntArray]:
        with tqdm(total=len(given), desc=program.label, leave=False, disable=not progress) as bar:
            results = remembered(
                kept, program, given, timeout, lambda: align_program(program, given, timeout, Seconds.now, bar.update)
            )
        if results.failures.count:
            report.notes.append(f"{program.label} failed between flanks; {results.failures.first}")
        return results.found or [np.zeros((0, 2), dtype=np.int64)] * len(given)

    report.results |= flank_results({program.label: align}, report.pairs, seed=seed)


def _signed(interval: Interval) -> str:
    value = f"{interval.value:+.3f}"
    return value if np.isnan(interval.low) else f"{value} [{interval.low:+.3f}, {interval.high:+.3f}]"


def _coded(pairs: IntArray) -> IntArray:
    return pairs[:, 0] * 1_000_003 + pairs[:, 1]
