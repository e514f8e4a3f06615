"""The measured pictures of the choosing guide, from what `benchmarks/choosing.py` wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from docs.figures import style

MEASURED = Path(__file__).parent / "choosing.json"
ITERATIONS = (1, 3, 5, 10, 22, 42, 82, 162, 320)
KINDS = ("dense", "banded", "padded", "unequal masses")


def measured() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(MEASURED.read_text())["kinds"]
    return found


def errors() -> Figure:
    """The largest relative error of a column by iterations; plain and accelerated."""
    figure, axes = style.figure(1, len(KINDS), (2.9, 2.9))
    for axis, kind in zip(axes[0], KINDS, strict=True):
        of_kind = measured()[kind]
        for k, (epsilon, found) in enumerate(of_kind.items()):
            colour = plt.get_cmap("viridis")(k / len(of_kind))
            for name, line in (("plain", "-"), ("accelerated", ":")):
                shown = [max(x, 1e-5) for x in found[f"{name} errors"]]
                label = f"epsilon {epsilon}" if name == "plain" and kind == KINDS[0] else None
                axis.loglog(ITERATIONS, shown, line, color=colour, label=label, linewidth=1.5)
        axis.axhline(0.01, color=style.KEY, linewidth=1)
        axis.axvline(22, color="0.8", linewidth=1)
        axis.set_title(kind, fontsize=10)
        axis.set_xlabel("iterations", fontsize=9)
        axis.set_ylim(7e-6, 4)
    axes[0, 0].set_ylabel("error of the worst column", fontsize=9)
    figure.legend(fontsize=8, frameon=False, loc="outside right center")
    return figure


def gaps() -> Figure:
    """How far the tail's gradient is from the converged plan's."""
    figure, axes = style.figure(1, 2, (4.2, 2.7))
    for axis, tail in zip(axes[0], (2, 8), strict=True):
        for kind in KINDS:
            found = {float(e): x[f"gap {tail}"] for e, x in measured()[kind].items() if f"gap {tail}" in x}
            axis.loglog(list(found), [100 * x for x in found.values()], "o-", markersize=4, label=kind)
        axis.axhline(5, color=style.KEY, linewidth=1)
        axis.set_title(f"R = {tail}", fontsize=10)
        axis.set_xlabel("epsilon", fontsize=9)
        axis.set_ylim(1e-3, 100)
        axis.invert_xaxis()
    axes[0, 0].set_ylabel("gradient off by, %", fontsize=9)
    axes[0, 0].legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def pictures() -> Iterator[tuple[str, Figure]]:
    yield "choosing-errors", errors()
    yield "choosing-gaps", gaps()
