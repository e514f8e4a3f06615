"""Pictures of a run: scores along both fine-tunings, and what the attention does to one test sequence."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from examples.common.plots import save_figure
from examples.pfam.pairs import decode

from .attention import FloatArray
from .stages import Result
from .training import Curve

_COLOURS, _DPI = ("#1b4b7a", "#d9480f"), 110


def write_pictures(result: Result, folder: str | Path) -> list[Path]:
    """`fine_tuning.png`, and `attention_layer1.png` and so on."""
    folder = Path(folder)
    paths = [folder / "fine_tuning.png"]
    plot_curves(result.curves, result.stages[0].score.accuracy, paths[0])
    for layer in range(len(next(iter(result.maps.values())))):
        paths.append(folder / f"attention_layer{layer + 1}.png")
        plot_attention({name: maps[layer] for name, maps in result.maps.items()}, result, layer, paths[-1])
    return paths


def plot_curves(curves: dict[str, Curve], level: float, path: Path) -> None:
    """Training loss of every step, test loss and test accuracy after every epoch; `level` is the accuracy before."""
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.7), layout="constrained")
    for (name, curve), colour in zip(curves.items(), _COLOURS):
        _loss(axes[0], curve, colour)
        steps = [step for step, _ in curve.scores]
        scores = [score for _, score in curve.scores]
        axes[1].plot(steps, [s.loss for s in scores], color=colour, marker="o", markersize=3, label=name)
        axes[2].plot(steps, [s.accuracy for s in scores], color=colour, marker="o", markersize=3, label=name)
    axes[2].axhline(level, color="grey", linestyle=":", linewidth=1, label="softmax, as trained")
    low, high = axes[2].get_ylim()
    middle = (low + high) / 2
    axes[2].set_ylim(min(low, middle - 0.075), max(high, middle + 0.075))  # a crop more or less is no cliff
    figure.legend(*axes[2].get_legend_handles_labels(), frameon=False, fontsize=9, ncols=3, loc="outside lower center")
    for axis, title in zip(axes, ("training loss (mean of 8 steps)", "test loss", "test accuracy")):
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("step of fine-tuning")
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path, _DPI)


def plot_attention(maps: dict[str, FloatArray], result: Result, layer: int, path: Path) -> None:
    """Maps [n + 1, n + 1] of one layer side by side, and below each what every token receives, its column sum."""
    letters = ["»", *decode(result.crop.residues)]
    figure, axes = plt.subplots(
        2, len(maps), figsize=(4.3 * len(maps), 5.9), height_ratios=[4, 1.3], sharex=True, sharey="row",
        layout="constrained",
    )  # fmt: skip
    top = float(np.quantile(np.stack(list(maps.values())), 0.995))  # one bright column must not blacken the rest
    image: AxesImage | None = None
    for column, (name, weights) in enumerate(maps.items()):
        image = axes[0, column].imshow(weights, cmap="Blues", vmin=0, vmax=top, aspect="auto")
        received = weights.sum(0)
        axes[0, column].set_title(name, loc="left", fontsize=11)
        axes[1, column].bar(range(len(received)), received, width=0.8, color=_COLOURS[0])
        axes[1, column].axhline(1, color=_COLOURS[1], linewidth=0.9)
        text = f"received: {received.min():.2f} to {received.max():.2f}"
        axes[1, column].set_title(text, loc="left", fontsize=9)
        for axis in axes[:, column]:
            axis.set_xticks(range(len(letters)), letters, fontsize=5.5, family="monospace")
            axis.tick_params(length=0, labelbottom=True)
        axes[1, column].spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_yticks(range(len(letters)), letters, fontsize=5.5, family="monospace")
    axes[0, 0].set_ylabel("who attends")
    axes[1, 0].set_ylabel("column sum")
    axes[1, 0].set_xlabel("who is attended to (» opens every crop)")
    assert image is not None
    figure.colorbar(image, ax=axes[0, :], label="weight, mean of heads", pad=0.01, fraction=0.03, extend="max")
    family = result.split.names[result.crop.family]
    figure.suptitle(f"Layer {layer + 1}, {result.crop.name} ({family}), not trained on", x=0.01, ha="left", fontsize=11)
    save_figure(figure, path, _DPI)


def _loss(axis: Axes, curve: Curve, colour: str, width: int = 8) -> None:
    losses = np.array(curve.losses)
    width = min(width, len(losses))
    smooth = np.convolve(losses, np.full(width, 1 / width), mode="valid")
    axis.plot(np.arange(width, len(losses) + 1), smooth, color=colour, linewidth=1.4)
