"""Pictures of a comparison: whether plan entries are probabilities, and what foretells an alignment's error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from examples.common.plots import legend, save_figure, write
from examples.common.text import clip

from .calibration import Calibration
from .comparison import Comparison, Doubts

_COLOURS = ("#868e96", "#1b4b7a", "#d9480f", "#2b8a3e", "#862e9c")


def plot_reliability(comparison: Comparison, path: Path) -> None:
    """Reliability diagrams of all ``Calibration.parts``, above how many there are in each bin."""
    figure = Figure(figsize=(13.0, 5.6), layout="constrained")
    titles = list(Calibration().parts)
    grid = figure.subplots(2, len(titles), sharex=True, sharey="row", height_ratios=[3, 1])
    for column, title in enumerate(titles):
        above, below = grid[:, column]
        above.plot([0, 1], [0, 1], color="black", linewidth=0.7, linestyle=":")
        named: list[str] = []
        for index, (name, found) in enumerate(comparison.calibration.items()):
            part = found.parts[title]
            mean, frequency, count = part.curve
            colour = _COLOURS[index % len(_COLOURS)]
            named.append(f"{clip(name)}: calibration error {part.calibration_error:.3f}")
            above.plot(mean, frequency, color=colour, marker="o", markersize=4, label=f"aligner {index}")
            below.plot(mean, count, color=colour, marker=".", linewidth=0.8)
        above.set_title(title, loc="left", fontsize=10)
        legend(above, named, fontsize=8)
        above.set(xlim=(0, 1), ylim=(0, 1))
        below.set(yscale="log", xlabel="P")
    grid[0, 0].set_ylabel("share that is right")
    grid[1, 0].set_ylabel("count")
    save_figure(figure, path)


def plot_errors(doubts: Doubts, title: str, path: Path) -> None:
    """The error of each pair against every number that might foretell it, with the rank correlation."""
    figure = Figure(figsize=(3.2 * len(doubts.numbers), 3.4), layout="constrained")
    grid = figure.subplots(1, len(doubts.numbers), sharey=True, squeeze=False)[0]
    error = 1 - np.array([result.values["f1"] for result in doubts.results])
    identity = np.array([result.identity for result in doubts.results])
    for axes, (name, found) in zip(grid, doubts.predictors.items(), strict=True):
        numbers = np.array(doubts.numbers[name])
        finite = np.isfinite(numbers)
        dots = axes.scatter(numbers[finite], error[finite], c=identity[finite], cmap="viridis", vmin=0, vmax=1, s=9)
        if finite.any() and numbers[finite].min() > 0 and np.ptp(np.log10(numbers[finite])) > 1.5:
            axes.set_xscale("log")
        known = f"Spearman {found.spearman.value:+.2f}" if finite.any() else "never finite"
        axes.set_title(f"{name}\n{known}", loc="left", fontsize=9)
        if not finite.any():
            axes.set_xticks([])
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set(ylabel="error, 1 - F1", ylim=(-0.02, 1.02))
    figure.colorbar(dots, ax=list(grid), label="identity")
    write(figure.suptitle("", fontsize=10), title)
    save_figure(figure, path)
