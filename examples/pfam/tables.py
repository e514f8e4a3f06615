"""The final report as plain text."""

from __future__ import annotations

from collections.abc import Mapping

from examples.common.tables import table

from .config import Config
from .evaluate import ALIGNED, PLAN, Scores

HEADINGS = {"f1": "F1", "barycentre": "barycentre error"} | {
    name: name for name in (*ALIGNED, *PLAN) if name not in ("f1", "barycentre")
}


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
