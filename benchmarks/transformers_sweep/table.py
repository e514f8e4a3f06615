"""The page of the documentation that the sweep writes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from benchmarks.transformers_sweep.judge import MIXED, NONE, PLAIN, SOFTMAX

Row = dict[str, Any]
EQUAL = 1e-5
_COLUMNS = (
    "| model | Sinkhorn | softmax | own | unused | padded = unpadded: eager | Sinkhorn | softmax = eager | refused |"
)
_HEAD = """\
# Sinkhorn attention in the models of Hugging Face transformers

Made by `python -m benchmarks.transformers_sweep` with transformers {version}: every model of its `AutoModel` and its
text encoders, built small from its config with random weights in float64 (float32 where it takes no other), and run
once each with eager attention, `register_transformers()` and `register_transformers(causal="softmax")`.
{summary}

How to read the tables:

- *Sinkhorn*, *softmax*, *own*, *unused*: attention layers, with `causal="softmax"`, as `transformers_report` measures
  them: those that were Sinkhorn attention; those that asked for it and were softmax, for they are causal or
  cross-attention of a decoder; those that never ask and keep their own attention; those that did not run with these
  inputs (a vision tower, where only text was given).
- *padded = unpadded*: two texts of 7 and 5 tokens in one batch give for the shorter one what it gives alone, with eager
  attention and with Sinkhorn attention: "yes" within 1e-5 of the largest output, else the difference. For pictures: a
  picture in a batch of two and alone.
- *softmax = eager*: with `base_iters=0, tail_iters=0` and with every layer switched off the outputs are those of eager
  attention, so masks, biases and scales are understood.
- *refused*: the number of the sentence below with which the model ends under plain `register_transformers()`.

Models that keep their own attention everywhere warn when they are built with `attn_implementation="sinkhorn"`, and
compute what they compute without it.
"""


def verdict(row: Row) -> str:
    """One line for the terminal."""
    if "error" in row:
        return str(row["error"])
    layers = " ".join(f"{n} {what}" for what, n in row.get(f"layers {MIXED}", {}).items() if n)
    return f"{layers}; padded {_padded(row, 'eager')} / {_padded(row, MIXED)}; {faults(row) or 'sound'}"


def page(rows: list[Row], version: str) -> str:
    judged = sorted((row for row in rows if "error" not in row), key=lambda row: row["model"].lower())
    sentences: dict[str, int] = {}
    groups: list[tuple[str, Callable[[Row], bool]]] = [
        ("Sinkhorn attention in every layer that ran", lambda row: _only(row, "sinkhorn")),
        ("Sinkhorn attention in some layers", lambda row: _count(row, "sinkhorn") > 0),
        ("Causal in every layer: softmax on request", lambda row: _count(row, "softmax") > 0),
        ("Attention of their own everywhere", lambda row: _count(row, "own") > 0),
        ("No attention at all", lambda row: True),
    ]
    parts, left, counts = [], judged, []
    for title, belongs in groups:
        here = [row for row in left if belongs(row)]
        left = [row for row in left if not belongs(row)]
        counts.append(f"{len(here)}: {title}")
        if title.startswith("No attention"):
            parts.append(f"## {title} ({len(here)})\n\n{', '.join(row['model'] for row in here)}.\n")
        else:
            parts.append(f"## {title} ({len(here)})\n\n{_table(here, sentences)}\n")
    wrong = [f"{row['model']} ({faults(row)})" for row in judged if faults(row)]
    summary = f"{len(judged)} of {len(rows)} were judged ({'; '.join(counts)}).\n"
    summary += (
        f"Where eager attention holds and Sinkhorn attention does not: {', '.join(wrong)}."
        if wrong
        else "There is none for which eager attention gives padded = unpadded and Sinkhorn attention does not."
    )
    listed = "\n".join(f"{n}. {sentence}" for sentence, n in sentences.items())
    parts.append(f"## What is refused, in which words\n\n{listed}\n")
    parts.append(f"## Not judged ({len(rows) - len(judged)})\n\n{_not_judged(rows)}\n")
    return _HEAD.format(version=version, summary=summary) + "\n" + "\n".join(parts)


def _table(rows: list[Row], sentences: dict[str, int]) -> str:
    lines = [_COLUMNS, "|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row["model"], *(str(_count(row, what) or "") for what in ("sinkhorn", "softmax", "own", "idle"))]
        cells += [_padded(row, "eager"), _padded(row, MIXED), _same(row)]
        numbers = [sentences.setdefault(s, len(sentences) + 1) for s in _sentences(row)]
        lines.append("| " + " | ".join([*cells, ", ".join(map(str, numbers))]) + " |")
    return "\n".join(lines)


def _count(row: Row, what: str) -> int:
    return int(row.get(f"layers {MIXED}", {}).get(what, 0))


def _only(row: Row, what: str) -> bool:
    return _count(row, what) > 0 and not any(
        _count(row, other) for other in ("sinkhorn", "softmax", "own") if other != what
    )


def _padded(row: Row, kind: str) -> str:
    found = row["padded"].get(kind)
    return "refused" if found is None else _number(found)


def _number(x: float) -> str:
    return "yes" if x <= EQUAL else "other shapes" if x == float("inf") else "NaN" if x != x else f"{x:.0e}"


def _same(row: Row) -> str:
    found = [row.get("minus eager", {}).get(kind) for kind in (SOFTMAX, NONE)]
    known = [x for x in found if x is not None]
    return _number(max(known) / 10) if known else "refused"


def _sentences(row: Row) -> list[str]:
    """Of every layer that refused, with the class of the layer left out."""
    found = list(row.get(f"sentences {PLAIN}", []))
    if not found and (error := row.get("refused", {}).get(PLAIN)):
        found = [error.partition(": ")[2]]
    return list(dict.fromkeys(re.sub(r"^\w+ (is causal|asks for|has )", r"The layer \1", s) for s in found))


def faults(row: Row) -> str:
    """Where Sinkhorn attention is worse than eager attention."""
    found = []
    if row["padded"]["eager"] <= EQUAL:
        found += [f"padded {_number(x)}" for kind, x in row["padded"].items() if not x <= EQUAL and kind != "eager"]
    found += [
        f"{kind} {_number(x)}" for kind, x in row.get("minus eager", {}).items() if kind != MIXED and not x <= 1e-4
    ]
    # A refusal is no fault, but where every layer is switched off there is nothing to refuse.
    found += [f"{kind}: {e}" for kind, e in row.get("refused", {}).items() if kind == NONE]
    return ", ".join(dict.fromkeys(found))


def _not_judged(rows: list[Row]) -> str:
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if "error" in row:
            reasons.setdefault(_reason(row["error"]), []).append(row["model"])
    return "\n".join(f"- {reason}: {', '.join(sorted(models, key=str.lower))}." for reason, models in reasons.items())


def _reason(error: str) -> str:
    if error.startswith("takes "):
        return "Takes neither text nor pictures (sound, time series, states)"
    if "ImportError" in error:
        return "Needs another library"
    if error.startswith("not built small"):
        return "The sweep's general rules for small configs make no valid one"
    if error.startswith("no inputs found"):
        return "The sweep finds no inputs that it takes"
    return error[:100]
