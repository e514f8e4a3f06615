"""The final report as plain text: aligned columns, nothing to install."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .config import Config
from .evaluate import ALIGNED, PLAN, Scores

HEADINGS = {"f1": "F1", "barycentre": "barycentre error"} | {
    name: name for name in (*ALIGNED, *PLAN) if name not in ("f1", "barycentre")
}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A text table; the first column is left-aligned, the others right-aligned."""
    widths = [max(len(row[c]) for row in (header, *rows)) for c in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *(line(row) for row in rows)])


def aligner_name(config: Config) -> str:
    """What the tables call a model: the attention is what tells models apart."""
    return f"{config.attention.capitalize()} aligner"


def alignment_table(scores: Mapping[str, Scores]) -> str:
    """Residue pairs and barycentre error of every aligner, macro over held-out families."""
    rows = [[name, *(f"{s.macro[m]:.3f}" for m in ALIGNED)] for name, s in scores.items()]
    return table(["held-out families, macro", *(HEADINGS[name] for name in ALIGNED)], rows)


def family_table(scores: Mapping[str, Scores]) -> str:
    """F1 / barycentre error, family by family."""
    rows = [
        [family, *(f"{s.families[family]['f1']:.3f} / {s.families[family]['barycentre']:.2f}" for s in scores.values())]
        for family in next(iter(scores.values())).families
    ]
    return table(["F1 / barycentre error", *scores], rows)


def plan_table(start: Scores, end: Scores, step: int) -> str:
    """What the plan itself says, against its value at the first evaluation, that of ``step``."""
    names = (*PLAN, "barycentre")
    rows = [[name, f"{start.macro[name]:.3f}", f"{end.macro[name]:.3f}"] for name in names]
    return table(["held-out plan, macro", f"step {step}", "now"], rows)
