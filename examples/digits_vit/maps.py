"""Attention drawn on single digits: the matrices of one, what patches receive, where the class token looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, PowerNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from torch import Tensor

from examples.common.plots import save_figure

from .data import GRID, PATCH, Digits, to_grid
from .measure import Outcome
from .plots import COLOURS, DPI, draw_reading

_WEIGHT, _WIDE, _SHARE = Normalize(0, 1), PowerNorm(0.5, 0, 1), LogNorm(1 / 8, 8)
_ROW, _MODEL = 0.95, 4.2  # inches: the height of a digit's row, the width of a model's four maps


def plot_matrices(image: Tensor, matrices: Mapping[str, Tensor], path: Path) -> None:
    """The attention of every head on a digit [8, 8], ``matrices`` name: [heads, 17, 17], below its column sums."""
    heads, tokens = next(iter(matrices.values())).shape[:2]
    highest = 1.05 * max(float(of_model.sum(1).max()) for of_model in matrices.values())
    figure = plt.figure(figsize=(11.0, 3.4 * len(matrices)), layout="constrained")
    axes = figure.subplots(2 * len(matrices), 1 + heads, height_ratios=[1, 2.6] * len(matrices), squeeze=False)
    for model, (name, of_model) in enumerate(matrices.items()):
        bars, maps = axes[2 * model], axes[2 * model + 1]
        bars[0].set_axis_off()
        bars[0].text(0, 0.5, name, fontsize=13, color=COLOURS[name])
        if model == 0:
            _draw_numbered(maps[0], image)
        else:
            maps[0].set_visible(False)
        for head, weights in enumerate(of_model):
            bars[head + 1].bar(np.arange(tokens), weights.sum(0).numpy(), width=0.9, color=COLOURS[name])
            bars[head + 1].axhline(1, color="black", linewidth=0.6)
            bars[head + 1].set(xlim=(-0.5, tokens - 0.5), ylim=(0, highest), xticks=[])
            bars[head + 1].spines[["top", "right"]].set_visible(False)
            bars[head + 1].set_title(f"head {head + 1}", loc="left", fontsize=9)
            shown = maps[head + 1].imshow(weights.numpy(), cmap="Blues", norm=_WIDE, aspect="auto")
            maps[head + 1].set(xticks=[0, 4, 8, 12, 16], yticks=[0, 4, 8, 12, 16], xlabel="key")
        bars[1].set_ylabel("column sum")
        maps[1].set_ylabel("query")
        if model == 0:
            figure.colorbar(shown, ax=axes[:, 1:], label="attention weight", fraction=0.02)
    save_figure(figure, path, DPI)


def plot_reading(
    digits: Digits, maps: Mapping[str, Tensor], outcomes: Mapping[str, Sequence[Outcome]], path: Path
) -> None:
    """What patches receive in block 1: on ``digits``, ``maps`` name: [n, heads, 16], and over the whole test set."""
    heights = [0.6 + _ROW * len(digits), 2.4]
    figure = plt.figure(figsize=(2.0 + _MODEL * len(maps), sum(heights)), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=heights)
    _draw_maps(top, digits, maps, _SHARE, "RdBu_r", "attention a patch receives")
    draw_reading(bottom.subplots(), outcomes)
    save_figure(figure, path, DPI)


def plot_class_token(digits: Digits, maps: Mapping[str, Tensor], path: Path) -> None:
    """Where the class token looks in the last block: ``maps`` name: [n, heads, 16]."""
    figure = plt.figure(figsize=(2.0 + _MODEL * len(maps), 0.6 + _ROW * len(digits)), layout="constrained")
    _draw_maps(figure, digits, maps, _WEIGHT, "Blues", "class token's weight on a patch")
    save_figure(figure, path, DPI)


def _draw_maps(
    figure: Figure | SubFigure, digits: Digits, maps: Mapping[str, Tensor], norm: Normalize, colours: str, label: str
) -> None:
    """A row per digit: the image, then a 4 x 4 map for every head of every model."""
    heads = next(iter(maps.values())).shape[1]
    widths = [1.0] + ([0.2] + [1.0] * heads) * len(maps)
    axes = figure.subplots(len(digits), len(widths), width_ratios=widths, squeeze=False)
    for row, image, label_of_digit in zip(axes, digits.images, digits.labels.tolist(), strict=True):
        row[0].imshow(image.numpy(), cmap="gray_r", norm=_WEIGHT)
        row[0].set_ylabel(f"a {label_of_digit}", rotation=0, ha="right", va="center", fontsize=9)
    for model, (name, values) in enumerate(maps.items()):
        first = 2 + model * (heads + 1)
        for row, of_digit in zip(axes, to_grid(values), strict=True):
            row[first - 1].set_visible(False)
            for axis, of_head in zip(row[first : first + heads], of_digit, strict=True):
                shown = axis.imshow(of_head.numpy(), cmap=colours, norm=norm)
        for head in range(heads):
            axes[0, first + head].set_title(f"head {head + 1}", fontsize=9)
        axes[0, first].set_title(f"{name}\nhead 1", fontsize=9)
    for axis in axes.flat:
        _frame(axis)
    bar = figure.colorbar(
        shown, ax=axes, label=label, fraction=0.03, pad=0.02, extend="both" if norm is _SHARE else None
    )
    if norm is _SHARE:
        bar.set_ticks([1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], labels=["1/8", "1/4", "1/2", "1", "2", "4", "8"])
        bar.minorticks_off()


def _draw_numbered(axis: Axes, image: Tensor) -> None:
    """The image with its patches numbered as tokens, 1 to 16; token 0 is the class token."""
    axis.imshow(image.numpy(), cmap="gray_r", norm=Normalize(0, 2))
    for number in range(GRID * GRID):
        row, column = divmod(number, GRID)
        corner = (PATCH * column - 0.5, PATCH * row - 0.5)
        axis.add_patch(Rectangle(corner, PATCH, PATCH, fill=False, edgecolor="#999999", linewidth=0.5))
        axis.text(corner[0] + PATCH / 2, corner[1] + PATCH / 2, str(number + 1), ha="center", va="center", fontsize=8)
    axis.set_xlabel("patch numbers;\ntoken 0: class token", fontsize=8)
    _frame(axis)


def _frame(axis: Axes) -> None:
    """No ticks, a thin grey edge."""
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color="#999999", linewidth=0.5)
