"""The final report as plain text: aligned columns, nothing to install."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .evaluate import ALIGNED, Scores

PLAN_METRICS = ("reconstruction", "sparse cross-entropy")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A text table; the first column is left-aligned, the others right-aligned."""
    widths = [max(len(row[c]) for row in (header, *rows)) for c in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *(line(row) for row in rows)])


def alignment_table(baselines: Mapping[str, Scores], model: Scores) -> str:
    """Residue pairs and barycentre error of the baselines and the model, macro over held-out families."""
    scores = {**baselines, "Sinkhorn aligner": model}
    rows = [[name, *(f"{s.macro[m]:.3f}" for m in ALIGNED)] for name, s in scores.items()]
    return table(["held-out families, macro", "precision", "recall", "F1", "barycentre error"], rows)


def family_table(baselines: Mapping[str, Scores], model: Scores) -> str:
    """F1 / barycentre error, family by family."""
    scores = {**baselines, "Sinkhorn aligner": model}
    rows = [
        [family, *(f"{s.families[family]['f1']:.3f} / {s.families[family]['barycentre']:.2f}" for s in scores.values())]
        for family in model.families
    ]
    return table(["F1 / barycentre error", *scores], rows)


def plan_table(start: Scores, end: Scores) -> str:
    """What the plan itself says, against its value at step 0."""
    names = (*PLAN_METRICS, "barycentre")
    rows = [[name, f"{start.macro[name]:.3f}", f"{end.macro[name]:.3f}"] for name in names]
    return table(["held-out plan, macro", "step 0", "now"], rows)
