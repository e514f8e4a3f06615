"""Curves of a run: learning, and how evenly patches are read over the whole test set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from examples.common.plots import save_figure

from .measure import Outcome
from .model import DUSTBIN, SINKHORN, SOFTMAX

DPI = 110
COLOURS = {SOFTMAX: "#d9480f", SINKHORN: "#1b4b7a", DUSTBIN: "#5c940d"}
# A twelfth of an octave wide; an even share, 1, is the middle of its bin.
_BINS = [2 ** ((k - 0.5) / 12) for k in range(-54, 56)]


def plot_learning(outcomes: Mapping[str, Sequence[Outcome]], path: Path) -> None:
    """Training loss by epoch, validation accuracy by epoch and by time: a thin line per seed, a thick one the mean."""
    figure, axes = plt.subplots(1, 3, figsize=(11.0, 3.5), layout="constrained")
    for name, of_seeds in outcomes.items():
        accuracy = np.array([[100 * s.accuracy for s in o.history.validation] for o in of_seeds])
        by_epoch = (*accuracy.shape, -1)  # [seeds, epochs, steps]
        loss = np.array([o.history.loss for o in of_seeds]).reshape(by_epoch).mean(-1)
        seconds = np.array([o.history.seconds for o in of_seeds]).reshape(by_epoch).sum(-1).cumsum(-1)
        epochs = np.broadcast_to(np.arange(1, accuracy.shape[1] + 1), accuracy.shape)
        for axis, x, y in zip(axes, (epochs, epochs, seconds), (loss, accuracy, accuracy), strict=True):
            axis.plot(x.T, y.T, color=COLOURS[name], linewidth=0.6, alpha=0.4)
            axis.plot(x.mean(0), y.mean(0), ".-", color=COLOURS[name], linewidth=1.5, markersize=3, label=name)
    labels = (("training loss", "epoch"), ("validation accuracy, %", "epoch"))
    for axis, (title, label) in zip(axes, (*labels, ("validation accuracy, %", "seconds of training")), strict=True):
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yscale("log")
    axes[0].set_yticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
    axes[0].set_yticks([], minor=True)
    for axis in axes[1:]:
        axis.set_ylim(70, 100.5)
    axes[0].legend(frameon=False)
    save_figure(figure, path, DPI)


def draw_reading(axis: Axes, outcomes: Mapping[str, Sequence[Outcome]]) -> None:
    """A histogram of what the patches receive, over all test digits, heads and seeds."""
    for name, of_seeds in outcomes.items():
        values = np.concatenate([o.reading.flatten().numpy() for o in of_seeds])
        weights = np.full(len(values), 100 / len(values))
        axis.hist(
            np.clip(values, _BINS[0], _BINS[-1]), _BINS, weights=weights, color=COLOURS[name], alpha=0.6, label=name
        )
    axis.set_xscale("log", base=2)
    powers = ["1/16", "1/8", "1/4", "1/2", "1", "2", "4", "8", "16"]
    axis.set_xticks([2.0**k for k in range(-4, 5)], powers)
    axis.set(xlabel="attention a patch receives", ylabel="% of patches")
    axis.set_title("all test digits, heads and seeds", loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
