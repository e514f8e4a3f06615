"""What the CPU engine is to reach, as ratios of one run."""

from __future__ import annotations

from .cases import Case
from .functions import SUBJECT
from .half_steps import half_step_seconds
from .tables import Cell, Tables

FULL, SHORT, LONG = 2048, 2048, 16384  # lengths that the targets are stated for


def targets(tables: Tables, full: int, short: int, long: int, window: tuple[int, int]) -> list[dict[str, object]]:
    """Print each ratio beside its target and return the lines; cases that were not measured yet are measured."""
    if (full, short, long) != (FULL, SHORT, LONG):
        print(f"a trial: the targets are stated for L = {FULL}, and for the band {SHORT} and {LONG}")
    records: list[dict[str, object]] = []

    def report(what: str, ratio: float | None, relation: str, target: float) -> None:
        """`what` has a place for the ratio."""
        verdict = "not measured"
        if ratio is not None:
            verdict = "reached" if (ratio >= target if relation == ">=" else ratio <= target) else "missed"
        said = what.format("?" if ratio is None else f"{ratio:.3g}x")
        print(f"  {said} (target {relation} {target:g}): {verdict}")
        records.append({"what": what, "ratio": ratio, "relation": relation, "target": target, "verdict": verdict})

    square = Case(1, 4, full)
    tables.measure(square, always=["dense"], only=[SUBJECT, "dense", "softmax"])
    own, dense, softmax = (tables.find(square, name) for name in (SUBJECT, "dense", "softmax"))
    print(f"full support, L = {full}, 4 heads of 64, float32, forward + backward")
    report(f"{SUBJECT} is {{}} faster than dense", over(dense, own), ">=", 20)
    report(f"{SUBJECT} takes {{}} the time of softmax", over(own, softmax), "<=", 3)

    near_case, far_case = (Case(1, 1, n, window=window) for n in (short, long))
    for case in (near_case, far_case):
        tables.measure(case, only=[SUBJECT, "softmax"])
    near, far, far_softmax = (
        tables.find(*line) for line in ((near_case, SUBJECT), (far_case, SUBJECT), (far_case, "softmax"))
    )
    print(f"window {window}, L = {long}, 1 head of 64, float32, forward + backward")
    seconds, peak = over(far, near), None
    if near and far and near.peak and far.peak:
        peak = far.peak / near.peak
    report(f"a token takes {{}} the time that it takes at L = {short}", seconds and seconds * short / long, "<=", 1.3)
    report(f"a token takes {{}} the peak memory that it takes at L = {short}", peak and peak * short / long, "<=", 1.3)
    report(f"{SUBJECT} is {{}} faster than softmax over the full length", over(far_softmax, far), ">=", 10)

    print("a half-step beside a matrix-vector product over as many bytes")
    for case in (square, far_case):
        found = half_step_seconds(SUBJECT, case)
        ratio = found["half-step"] / found["product"]
        where = f"{case.support}, L = {case.length}, heads: {case.heads}"
        report(f"{where}: it takes {{}} the time", ratio if ratio > 0 else None, "<=", 1.5)  # below 0 is noise
    return records


def over(x: Cell | None, y: Cell | None) -> float | None:
    """Ratio of the times of two lines."""
    return x.seconds / y.seconds if x and y and x.seconds and y.seconds else None
