"""A comparison as text, table by table, and as plain values for JSON."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from examples.common.tables import table

from .baselines import GLOBAL_GAP, LOCAL_GAP
from .calibration import Calibration, Reliability
from .comparison import REFERENCE, REFERENCES, Comparison
from .evaluate import PLAN, Result, Scores
from .summary import LEVEL, LOWEST, RESAMPLES, Interval, Summary, by_identity, differences, summarise
from .tables import HEADINGS

LEGEND = textwrap.fill(
    f"macro: means over a family's pairs, then over families, with {LEVEL:.0%} percentile intervals of {RESAMPLES} "
    "bootstrap draws of families; micro: the counts of all pairs pooled. Identity: identical residues over aligned "
    "columns of the reference. Row accuracy: residues of both sides whose largest plan entry, dustbin included, is the "
    "reference's; of baselines without a plan, whose partner, or lack of one, is. Barycentre error, in residues: of a "
    "plan, how far its rows' mean positions are off; of pairs, decoded ones too, how far the partners are, with "
    "straight lines between pairs. Both alignment programs take BLOSUM62; a gap's first and each further residue cost "
    f"{GLOBAL_GAP[0]:g} and {GLOBAL_GAP[1]:g} (Needleman-Wunsch, at the ends too) or "
    f"{LOCAL_GAP[0]:g} and {LOCAL_GAP[1]:g} (Smith-Waterman): --gap-grid scores others. A predictor of errors is "
    "judged by where the interval of its rank correlation lies. Seconds a pair are this machine's, an installed "
    "program's with its start, and of what makes plans with decoding.",
    120,
    break_on_hyphens=False,
)


def report(comparison: Comparison) -> str:
    """Every table."""
    parts = [
        headline_table(comparison.results),
        time_table(comparison),
        identity_table(comparison.results),
        *([difference_table(comparison)] if comparison.models else []),
        aligner_family_table(comparison),
        plans_table(comparison.results),
        decoder_table(comparison.decoded),
        calibration_table(comparison.calibration),
        *(predictor_table(comparison, name) for name in comparison.models),
        *(["\n".join(f"note: {note}" for note in comparison.notes)] if comparison.notes else []),
        LEGEND,
    ]
    return "\n\n".join(parts)


def headline_table(results: Mapping[str, Sequence[Result]]) -> str:
    """Residue pairs, macro over families with intervals and micro; row accuracy and barycentre error, macro."""
    rows = []
    for name, found in results.items():
        summary = summarise(found)
        macro, micro = summary.macro, summary.micro
        row = [f"{macro[of].value:.3f}" for of in ("precision", "recall")] + [_with_ends(macro["f1"])]
        row += [f"{number:.3f}" for number in (micro.precision, micro.recall, micro.f1)]
        rows.append([name, *row, _with_ends(macro["row accuracy"]), _with_ends(macro["barycentre"], 2)])
    header = ["macro over families [95 %]", "precision", "recall", "F1", "micro precision", "recall", "F1"]
    return table([*header, HEADINGS["row accuracy"], HEADINGS["barycentre"]], rows)


def time_table(comparison: Comparison) -> str:
    """Seconds a pair: models on their device and threads, programs on one thread, with their start."""
    counts = {name: len(results) for name, results in comparison.results.items()}
    rows = [[name, *(f"{part / count:.4f}" for part in comparison.seconds[name])] for name, count in counts.items()]
    return table(["time", "seconds a pair", "of processors"], rows)


def identity_table(results: Mapping[str, Sequence[Result]]) -> str:
    """F1 by the identity of the pair in the reference alignment."""
    binned = {name: by_identity(found) for name, found in results.items()}
    bins = next(iter(binned.values()))
    rows = [["pairs (families)", *(f"{len(part)} ({len({r.family for r in part})})" for part in bins.values())]]
    for name, found in binned.items():
        summaries = [summarise(part) for part in found.values()]
        rows.append([name, *(_with_ends(s.macro["f1"]) if s.pairs else "" for s in summaries)])
    return table(["F1, macro [95 %], by identity", *bins], rows)


def difference_table(comparison: Comparison) -> str:
    """What each model has over each of ``REFERENCES`` and every installed program, with paired intervals."""
    rows, all_of = [], comparison.results
    for name, reference in itertools.product(comparison.models, (*REFERENCES, *comparison.programs)):
        mine, theirs = ({"all": all_of[of], **by_identity(all_of[of])} for of in (name, reference))
        for label, results in mine.items():
            if results and (reference in REFERENCES or label in ("all", LOWEST)):
                part = differences(results, theirs[label])
                found = (_with_ends(part["f1"], sign="+"), _with_ends(part["barycentre"], 2, "+"))
                rows.append([f"{name} less {reference}", label, *found])
    return table(["paired [95 %]", "pairs", HEADINGS["f1"], HEADINGS["barycentre"]], rows)


def aligner_family_table(comparison: Comparison) -> str:
    """F1 / barycentre error of the models and ``REFERENCE``, family by family, beside its size and mean identity."""
    shown = [REFERENCE, *comparison.models]
    families = {name: Scores.of(comparison.results[name]).families for name in shown}
    identities: dict[str, list[float]] = {}
    for result in comparison.results[REFERENCE]:
        identities.setdefault(result.family, []).append(result.identity)
    rows = []
    for family, identity in identities.items():
        values = [f"{families[n][family]['f1']:.3f} / {families[n][family]['barycentre']:.2f}" for n in shown]
        rows.append([family, str(len(identity)), f"{sum(identity) / len(identity):.2f}", *values])
    return table(["F1 / barycentre error", "pairs", "identity", *shown], rows)


def plans_table(results: Mapping[str, Sequence[Result]]) -> str:
    """What plans alone say; perplexity is exp of the sparse cross-entropy: between how many keys a residue wavers."""
    rows = []
    for name, found in results.items():
        macro = summarise(found).macro
        if PLAN[0] in macro:
            rows.append([name, *(_with_ends(macro[of]) for of in PLAN), _with_ends(_perplexity(macro), 2)])
    return table(["plans, macro [95 %]", *(HEADINGS[of] for of in PLAN), "perplexity"], rows)


def decoder_table(decoded: Mapping[str, Mapping[str, Sequence[Result]]]) -> str:
    """F1 of the same plans under each rule, and the barycentre error of the pairs, measured as a baseline's."""
    rows = []
    for name, rules in decoded.items():
        means = [summarise(found).macro for found in rules.values()]
        rows.append([name, *(f"{_with_ends(mean['f1'])} / {_with_ends(mean['barycentre'], 2)}" for mean in means)])
    return table(["F1 / barycentre error, macro [95 %], by decoder", *next(iter(decoded.values()))], rows)


def calibration_table(calibration: Mapping[str, Calibration]) -> str:
    """Calibration error and Brier score of all ``Calibration.parts``."""
    rows = []
    for name, found in calibration.items():
        for label, part in found.parts.items():
            mean = [f"{number.sum() / max(part.count.sum(), 1):.3f}" for number in (part.predicted, part.true)]
            count = f"{int(part.count.sum())}"
            rows.append([name, label, count, *mean, f"{part.calibration_error:.3f}", f"{part.brier:.3f}"])
    header = ["calibration as probabilities", "of", "count", "mean P", "true", "calibration error", "Brier"]
    return table(header, rows)


def predictor_table(comparison: Comparison, name: str) -> str:
    """What tells a bad alignment from a good one without the answer."""
    rows = []
    for label, found in comparison.doubts[name].predictors.items():
        numbers = [_with_ends(found.spearman, 2, "+"), *("" if math.isnan(x) else f"{x:.3f}" for x in found.f1)]
        rows.append([label, f"{found.finite} of {found.pairs}", *numbers, found.verdict])
    header = [f"{name}: what foretells the error 1 - F1", "finite", "Spearman [95 %]"]
    return table([*header, "F1, most trusted quarter", "least trusted quarter", "verdict"], rows)


def as_values(comparison: Comparison) -> dict[str, Any]:
    """All the figures as plain values for JSON; what is not a number is None."""
    aligners = {}
    for name, results in comparison.results.items():
        values: dict[str, Any] = _summary(summarise(results))
        taken = comparison.seconds[name]
        values["seconds_a_pair"] = {"wall": taken.wall / len(results), "cpu": taken.cpu / len(results)}
        values["identity"] = {label: _summary(summarise(part)) for label, part in by_identity(results).items()}
        values["family_means"] = Scores.of(results).families
        if name in comparison.calibration:
            found = comparison.calibration[name]
            for of in ("f1", "barycentre"):
                rules = comparison.decoded[name].items()
                values[f"{of}_by_decoder"] = {rule: _interval(summarise(part).macro[of]) for rule, part in rules}
            values["calibration"] = {label: _reliability(part) for label, part in found.parts.items()}
        if name in comparison.doubts:
            for reference in REFERENCES:
                values[f"less {reference}"] = _intervals(differences(results, comparison.results[reference]))
            values["predictors"] = {
                label: {
                    "pairs": found.pairs,
                    "finite": found.finite,
                    "spearman": _interval(found.spearman),
                    "f1_of_most_and_least_trusted_quarter": [_number(value) for value in found.f1],
                }
                for label, found in comparison.doubts[name].predictors.items()
            }
        aligners[name] = values
    return aligners


def _perplexity(macro: Mapping[str, Interval]) -> Interval:
    return Interval(*(math.exp(number) for number in macro["sparse cross-entropy"]))


def _with_ends(interval: Interval, digits: int = 3, sign: str = "") -> str:
    value = "" if math.isnan(interval.value) else f"{interval.value:{sign}.{digits}f}"
    if math.isnan(interval.low):
        return value
    return f"{value} [{interval.low:{sign}.{digits}f}, {interval.high:{sign}.{digits}f}]"


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _interval(interval: Interval) -> dict[str, float | None]:
    return {name: _number(value) for name, value in interval._asdict().items()}


def _intervals(intervals: Mapping[str, Interval]) -> dict[str, Any]:
    return {name: _interval(interval) for name, interval in intervals.items()}


def _summary(summary: Summary) -> dict[str, Any]:
    macro = dict(summary.macro)
    if "sparse cross-entropy" in macro:
        macro["perplexity"] = _perplexity(macro)
    micro = {name: getattr(summary.micro, name) for name in ("precision", "recall", "f1")}
    return {"pairs": summary.pairs, "families": summary.families, "macro": _intervals(macro), "micro": micro}


def _reliability(found: Reliability) -> dict[str, Any]:
    mean, frequency, count = (part.tolist() for part in found.curve)
    scores = {"calibration_error": found.calibration_error, "brier": found.brier}
    return {"mean": mean, "frequency": frequency, "count": count, **scores}
