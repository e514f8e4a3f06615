"""The picture of a plan between two proteins, the decoded alignment over it."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from examples.common.plots import save, write

from .alignment import PairwiseAlignment

_FLOOR = 1e-4
_LINE = "#d9480f"


def draw_alignment(alignment: PairwiseAlignment, plan: npt.NDArray[np.floating], names: tuple[str, str]) -> bytes:
    """A PNG of the plan [n+1, m+1] on a logarithmic scale, the dustbins beside and below, and the alignment's pairs."""
    n, m = plan.shape[0] - 1, plan.shape[1] - 1
    across, down = max(2, m // 40), max(2, n // 40)
    figure = Figure(figsize=(7.6, 6.6 * min(max(n / m, 0.6), 1.4)), layout="constrained")
    grid = figure.subplots(2, 2, width_ratios=[m, across], height_ratios=[n, down], squeeze=False)
    norm = LogNorm(_FLOOR, 1.0)
    for axes, part in (
        (grid[0, 0], plan[:n, :m]),
        (grid[0, 1], plan[:n, m:]),
        (grid[1, 0], plan[n:, :m]),
    ):
        # Residues are numbered from 1, as in the text.
        extent = (0.5, part.shape[1] + 0.5, part.shape[0] + 0.5, 0.5)
        image = axes.imshow(np.maximum(part, _FLOOR), cmap="Blues", norm=norm, aspect="auto", extent=extent)
    grid[1, 1].set_axis_off()
    pairs = alignment.columns[alignment.paired] + 1
    for run in np.split(pairs, np.flatnonzero(np.any(np.diff(pairs, axis=0) != 1, axis=1)) + 1):
        grid[0, 0].plot(run[:, 1], run[:, 0], color=_LINE, linewidth=0.9, marker="." if len(run) == 1 else None, ms=2)
    grid[0, 0].plot([], [], color=_LINE, linewidth=0.9, label="the alignment")
    grid[0, 0].legend(loc="lower left", frameon=False)
    grid[0, 0].set(xticks=[])
    write(grid[0, 0].yaxis.label, f"residue of {names[0]}")
    grid[0, 1].set(xticks=[1], xticklabels=["no partner"], yticks=[])
    grid[1, 0].set(yticks=[1], yticklabels=["no partner"])
    write(grid[1, 0].xaxis.label, f"residue of {names[1]}")
    summary = alignment.summary()
    title = f"{summary.pairs} pairs, mean confidence {summary.mean_confidence:.2f}"
    grid[0, 0].set_title(title, loc="left", fontsize=11)
    figure.colorbar(image, ax=grid, label="plan", pad=0.02, fraction=0.05)
    file = io.BytesIO()
    save(figure, file)
    return file.getvalue()
