"""The page of the documentation that the sweep writes."""

from __future__ import annotations

from typing import Any

from benchmarks.transformers_sweep.judge import MIXED, NONE, PLAIN, SOFTMAX

Row = dict[str, Any]
_EQUAL = 1e-5


def verdict(row: Row) -> str:
    if "error" in row:
        return row["error"]
    layers = row.get(f"layers {MIXED}", {})
    return f"{layers} padded {row['padded']} minus eager {row.get('minus eager')} refused {row.get('refused')}"


def page(rows: list[Row], version: str) -> str:
    return "\n".join(verdict(row) for row in rows)
