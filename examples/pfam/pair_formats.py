"""An aligned pair as text, in the formats that other programs read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

from .alignment import GAP
from .library import AlignedPair

TSV_COLUMNS = (
    "query", "key", "query_length", "key_length", "query_start", "query_end", "key_start", "key_end", "pairs",
    "identical", "similar", "mean_confidence", "expected_accuracy", "homology", "cigar",
)  # fmt: skip
_BEST_QUALITY = 60


def cigar(pair: AlignedPair) -> str:
    """M, I and D of the columns from the first pair to the last; I is a query residue alone, D a key residue alone."""
    inside = pair.alignment.paired.nonzero()[0]
    if not len(inside):
        return ""
    columns = pair.alignment.columns[inside[0] : inside[-1] + 1].tolist()
    kinds = ("I" if key == GAP else "D" if query == GAP else "M" for query, key in columns)
    return "".join(f"{len(list(run))}{kind}" for kind, run in groupby(kinds))


def tsv(pair: AlignedPair) -> str:
    """The row of ``TSV_COLUMNS``; residues are numbered from 1, and what there is not is left empty."""
    summary, pairs = pair.summary, pair.pairs + 1
    ends = [str(end) for side in pairs.T for end in (side[0], side[-1])] if len(pairs) else [""] * 4
    values = [
        *pair.names,
        *(str(len(letters)) for letters in pair.alignment.letters),
        *ends,
        *(str(count) for count in (summary.pairs, summary.identical, summary.similar)),
        f"{summary.mean_confidence:.4f}",
        f"{summary.expected_accuracy:.4f}",
        "" if pair.homology is None else f"{pair.homology:.4f}",
        cigar(pair),
    ]
    return "\t".join(values) + "\n"


def json_line(pair: AlignedPair) -> str:
    """All that is known but the plan; residues are numbered from 1."""
    summary = pair.summary
    values = {
        "names": list(pair.names),
        "lengths": [len(letters) for letters in pair.alignment.letters],
        "pairs": summary.pairs,
        "identical": summary.identical,
        "similar": summary.similar,
        "mean_confidence": round(summary.mean_confidence, 6),
        "expected_accuracy": round(summary.expected_accuracy, 6),
        "homology": None if pair.homology is None else round(pair.homology, 6),
        "query_residues": (pair.pairs[:, 0] + 1).tolist(),
        "key_residues": (pair.pairs[:, 1] + 1).tolist(),
        "confidence": pair.confidence.round(4).tolist(),
    }
    return json.dumps(values, separators=(",", ":")) + "\n"


def fasta(pair: AlignedPair) -> str:
    """Both rows with '-' for gaps; an empty line ends the pair."""
    return "".join(f">{name}\n{row}\n" for name, row in zip(pair.names, pair.alignment.rows, strict=True)) + "\n"


def a3m(pair: AlignedPair) -> str:
    """The key against the query's residues: an aligned one in upper case, '-' for none, what is between in lower."""
    letters = pair.alignment.letters[1]
    row = ("-" if key == GAP else letters[key].lower() if query == GAP else letters[key]
           for query, key in pair.alignment.columns.tolist())  # fmt: skip
    known = "" if pair.homology is None else f" homology={pair.homology:.4f}"
    return f">{pair.names[1]} confidence={pair.summary.mean_confidence:.4f}{known}\n{''.join(row)}\n"


def paf(pair: AlignedPair) -> str:
    """A line of PAF, of proteins: from 0, ends excluded; the quality is -10 log10 of the mean doubt, 60 at most.

    Tags: cg, the CIGAR; cf, the mean confidence; hp, the probability of homology. No line where nothing is aligned.
    """
    if not len(pair.pairs):
        return ""
    summary = pair.summary
    (first, start), (last, end) = pair.pairs[0].tolist(), pair.pairs[-1].tolist()
    lengths = [len(letters) for letters in pair.alignment.letters]
    doubt = max(1 - summary.mean_confidence, 10 ** (-_BEST_QUALITY / 10))
    span = (last - first + 1) + (end - start + 1) - summary.pairs
    values = [pair.names[0], lengths[0], first, last + 1, "+", pair.names[1], lengths[1], start, end + 1]
    values += [summary.identical, span, round(-10 * math.log10(doubt))]
    tags = [f"cg:Z:{cigar(pair)}", f"cf:f:{summary.mean_confidence:.4f}"]
    tags += [] if pair.homology is None else [f"hp:f:{pair.homology:.4f}"]
    return "\t".join([*map(str, values), *tags]) + "\n"


@dataclass(frozen=True)
class Format:
    """A file's name, what a pair adds to it, and what it begins with."""

    file: str
    of: Callable[[AlignedPair], str]
    head: str = ""


FORMATS = {
    "tsv": Format("alignments.tsv", tsv, "\t".join(TSV_COLUMNS) + "\n"),
    "jsonl": Format("alignments.jsonl", json_line),
    "fasta": Format("alignments.fasta", fasta),
    "a3m": Format("alignments.a3m", a3m),
    "paf": Format("alignments.paf", paf),
}
"""By the names that ``--format`` takes."""
