"""An alignment as text: the usual three lines, 60 columns a block, and a fourth for the confidence."""

from __future__ import annotations

from .alignment import GAP, PairwiseAlignment
from .sequences import Protein, short_name

WIDTH = 60
LEGEND = """\
| identical, : similar (BLOSUM62 above 0), . another pair
confidence: the plan's entry of a pair, or opposite a gap that of having no partner; in tenths, * from 0.95"""
_ALIKE = 0.5
"""The probability of homology from which on a common part is said to be found: as likely as not."""
_CONFIDENCE = "confidence"


def display_names(proteins: tuple[Protein, Protein]) -> tuple[str, str]:
    """Short names to show; longer ones where the short ones are the same."""
    first, second = (short_name(protein.name) for protein in proteins)
    return (first, second) if first != second else (proteins[0].name, proteins[1].name)


def three_lines(alignment: PairwiseAlignment, names: tuple[str, str]) -> str:
    """The blocks. Beside a row stand its first and last residue's numbers, from 1; a row of gaps has none."""
    margin = max(len(name) for name in (*names, _CONFIDENCE))
    digits = len(str(max(len(letters) for letters in alignment.letters)))
    indent = " " * (margin + digits + 2)
    blocks = []
    for start in range(0, len(alignment.columns), WIDTH):
        part = slice(start, start + WIDTH)
        rows = []
        for name, row, side in zip(names, alignment.rows, alignment.columns[part].T, strict=True):
            residues = side[side != GAP] + 1
            first, last = (str(residues[0]), str(residues[-1])) if len(residues) else ("", "")
            rows.append(f"{name:<{margin}} {first:>{digits}} {row[part]} {last}".rstrip())
        middle = (indent + alignment.middle[part]).rstrip()
        confidence = f"{_CONFIDENCE:<{len(indent)}}{alignment.digits[part]}"
        blocks.append("\n".join([rows[0], middle, rows[1], confidence]))
    return "\n\n".join(blocks)


def summary_lines(alignment: PairwiseAlignment, names: tuple[str, str], homology: float | None = None) -> str:
    """What the alignment amounts to, and how far to trust it; first the verdict, by the probability of homology."""
    summary, lines = alignment.summary(), []
    if homology is not None:
        found = "a common part" if homology >= _ALIKE and summary.pairs else "no common part found"
        lines.append(f"{found}: related with probability {homology:.2f}, where half of all pairs are")
    if summary.pairs == 0:
        return "\n".join([*lines, "no residue was aligned: the aligner finds nothing that these sequences share"])
    shares = [f"{100 * summary.pairs / len(row):.0f} % of {name}" for row, name in zip(alignment.letters, names)]
    right = round(summary.pairs * summary.mean_confidence)
    doubtful = f"; {summary.doubtful} of them below 0.5" if summary.doubtful else ""
    rows = {
        "aligned pairs": f"{summary.pairs}, {' and '.join(shares)}",
        "identity": f"{_percent(summary.identical, summary.pairs)} of the pairs, "
        f"similar {_percent(summary.similar, summary.pairs)}",
        "mean confidence": f"{summary.mean_confidence:.2f}: about {right} of the {summary.pairs} pairs should be "
        f"right{doubtful}",
        "expected accuracy": f"{summary.expected_accuracy:.2f} of all residues should have the right partner, or none",
    }
    width = max(len(label) for label in rows)
    return "\n".join([*lines, *(f"{label:<{width}}  {text}" for label, text in rows.items())])


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} % ({part})"
