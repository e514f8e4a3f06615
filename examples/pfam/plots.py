"""Pictures of a run: a held-out plan over its true alignment, the learning curves, the marginal residuals."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from examples.common.plots import save_figure, write
from examples.common.text import clip

from .decode import DECODERS, DEFAULT_DECODER
from .evaluate import Scores
from .metrics import pair_score
from .pairs import Pair
from .train import History

FloatArray = npt.NDArray[np.floating]
_FLOOR = 1e-4
_INK, _SOFT, _TRUTH = "#1b4b7a", "#a9bfd6", "#d9480f"


def plot_plan(pair: Pair, plan: FloatArray, path: Path) -> None:
    """The plan [n+1, m+1] of a pair on a logarithmic scale, its dustbin beside it, the true alignment over it."""
    n, m = plan.shape[0] - 1, plan.shape[1] - 1
    score = pair_score(DECODERS[DEFAULT_DECODER](plan), pair.target)
    bin_width = max(2, m // 40)
    size = (7.6, 6.6 * min(max(n / m, 0.6), 1.4))
    figure, axes = plt.subplots(1, 2, figsize=size, width_ratios=[m, bin_width], sharey=True, layout="constrained")
    norm = LogNorm(_FLOOR, 1.0)
    image = axes[0].imshow(np.maximum(plan[:n, :m], _FLOOR), cmap="Blues", norm=norm, aspect="auto", origin="upper")
    axes[1].imshow(np.maximum(plan[:n, m:], _FLOOR), cmap="Blues", norm=norm, aspect="auto", origin="upper")
    for run in np.split(pair.target, np.flatnonzero(np.any(np.diff(pair.target, axis=0) != 1, axis=1)) + 1):
        axes[0].plot(run[:, 1], run[:, 0], color=_TRUTH, linewidth=0.9, marker="." if len(run) == 1 else None, ms=2)
    axes[0].plot([], [], color=_TRUTH, linewidth=0.9, label="Pfam's alignment")
    axes[0].legend(loc="lower left", frameon=False)
    write(axes[0].xaxis.label, f"residue of {pair.names[1]}")
    write(axes[0].yaxis.label, f"residue of {pair.names[0]}")
    write(axes[0].set_title("", loc="left", fontsize=11), f"{clip(pair.family)}, held out: F1 {score.f1:.2f}")
    axes[1].set_xticks([0], ["dustbin"])
    figure.colorbar(image, ax=axes, label="plan", pad=0.02, fraction=0.05)
    save_figure(figure, path)


def plot_learning(history: History, baselines: Mapping[str, Scores], path: Path) -> None:
    """Training loss, and the held-out quantities against the baselines' levels."""
    figure, axes = plt.subplots(2, 2, figsize=(9.0, 6.2), layout="constrained")
    loss = np.array(history.loss)
    steps = [step for step, _ in history.evaluations]
    width = max(1, min(25, len(loss) // 8))
    axes[0, 0].plot(np.arange(1, len(loss) + 1), loss, color=_SOFT, linewidth=0.5)
    if len(loss) > width:
        smooth = np.convolve(loss, np.full(width, 1 / width), mode="valid")
        axes[0, 0].plot(np.arange(width, len(loss) + 1), smooth, color=_INK, linewidth=1.4)
    axes[0, 0].set_title("training loss: -log plan per residue", loc="left", fontsize=10)
    for name, style in (("reconstruction", "-"), ("sparse cross-entropy", "--")):
        values = [scores.macro[name] for _, scores in history.evaluations]
        axes[0, 1].plot(steps, values, style, color=_INK, marker="o", markersize=3, label=name)
    axes[0, 1].set_title("held-out plan", loc="left", fontsize=10)
    axes[0, 1].legend(frameon=False)
    for axis, metric, title in (
        (axes[1, 0], "f1", "held-out F1 of residue pairs"),
        (axes[1, 1], "barycentre", "held-out barycentre error, residues (log scale)"),
    ):
        axis.plot(steps, [s.macro[metric] for _, s in history.evaluations], color=_INK, marker="o", markersize=3)
        _levels(axis, baselines, metric)
        axis.set_title(title, loc="left", fontsize=10)
    axes[1, 1].set_yscale("log")  # it starts dozens of times above the baselines
    for axis in axes.flat:
        axis.set_xlabel("step")
        if axis is not axes[1, 1]:
            axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1, 0].set_ylim(0, 1)
    save_figure(figure, path)


def plot_residuals(curves: Mapping[str, list[tuple[int, float]]], used: int, path: Path) -> None:
    """Largest column-marginal error after each number of iterations; ``used`` marks what training runs."""
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for (name, curve), style in zip(curves.items(), ("--", "-"), strict=False):
        axis.semilogy([t for t, _ in curve], [max(r, 1e-9) for _, r in curve], style, color=_INK, label=name)
    axis.axvline(used, color=_TRUTH, linewidth=0.9)
    axis.text(
        used, 0.98, " T + R in training", transform=axis.get_xaxis_transform(), va="top", color=_TRUTH, fontsize=9
    )
    axis.set(xlabel="Sinkhorn iterations", ylabel="largest column error")
    axis.set_title("Marginal residual on a held-out pair, dustbin included (rows are exact)", loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    save_figure(figure, path)


def _levels(axis: Axes, baselines: Mapping[str, Scores], metric: str) -> None:
    for (name, scores), style in zip(baselines.items(), itertools.cycle((":", "-.", "--", (0, (1, 4)))), strict=False):
        level = scores.macro[metric]
        axis.axhline(level, color=_TRUTH, linestyle=style, linewidth=1.0, label=name)
    axis.legend(frameon=False, fontsize=8, loc="best")
