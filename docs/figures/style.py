"""One look for all pictures, which is readable on a light and on a dark page."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from docs.figures.inputs import Input

QUERY, KEY, SOFTMAX, TRANSPORT = "#1769aa", "#b3541e", "#7a4fb5", "#1769aa"
MAP = "Blues"
LABELS_UP_TO = 16


def figure(rows: int, cols: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """A grid of pictures of `size` inches each."""
    made, axes = plt.subplots(rows, cols, figsize=(cols * size[0], rows * size[1]), layout="constrained", squeeze=False)
    made.patch.set_facecolor("white")
    return made, axes


def draw(axes: Axes, shown: Input, weights: np.ndarray) -> None:
    """Weights [L, S], or [L+1, S+1] with the dustbin last: lines between points, colours for ink, else a matrix."""
    if shown.name == "digits":
        draw_ink(axes, shown, weights)
    elif shown.row_places is not None:
        draw_lines(axes, shown, weights)
    else:
        draw_matrix(axes, weights, shown.rows, shown.cols)


def draw_matrix(axes: Axes, weights: np.ndarray, rows: Sequence[str] = (), cols: Sequence[str] = ()) -> None:
    axes.imshow(weights**0.5, cmap=MAP, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    extra = weights.shape[0] - len(rows)
    names = [*rows, *["dustbin"] * extra], [*cols, *["dustbin"] * extra]
    if rows and len(rows) <= LABELS_UP_TO:
        axes.set_yticks(range(len(names[0])), names[0], fontsize=7)
        axes.set_xticks(range(len(names[1])), names[1], fontsize=7, rotation=90)
    else:
        axes.set_xticks([])
        axes.set_yticks([])


def draw_lines(axes: Axes, shown: Input, weights: np.ndarray) -> None:
    assert shown.row_places is not None and shown.col_places is not None
    a, b = shown.row_places, shown.col_places
    i, j = np.nonzero(weights[: len(a), : len(b)] > 0.02)
    part = weights[i, j]
    lines = LineCollection(np.stack([a[i], b[j]], 1), linewidths=2.2 * part, colors=QUERY, alpha=0.55)
    axes.add_collection(lines)
    received = weights[: len(a), : len(b)].sum(0)
    axes.scatter(*a.T, s=16, color=QUERY, zorder=3)
    axes.scatter(*b.T, s=6 + 22 * received * len(b) / len(a), color=KEY, marker="s", zorder=3)
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.margins(0.06)


def draw_ink(axes: Axes, shown: Input, weights: np.ndarray) -> None:
    """The first digit in colours by place; the second in those that its pixels receive, and as large."""
    assert shown.row_places is not None and shown.col_places is not None
    a, b = shown.row_places, shown.col_places
    x, y = ((a[:, k] - a[:, k].min()) / np.ptp(a[:, k]) for k in (0, 1))
    colours = np.stack([0.15 + 0.8 * y, 0.25 + 0.45 * x, 0.95 - 0.8 * y], 1)
    received = weights.sum(0)
    mixed = weights.T @ colours / received[:, None]
    shift = np.array([1.6 * np.ptp(a[:, 0]), 0.0])
    axes.scatter(*a.T, s=90, marker="s", color=colours)
    axes.scatter(*(b + shift).T, s=90 * np.minimum(received * len(b) / len(a), 2.5), marker="s", color=mixed)
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.margins(0.12)
