"""What a still picture cannot show: how the iterations move mass, one half-step after the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter

from docs.figures import style
from docs.figures.book import softmax, transport
from docs.figures.inputs import Input, points, sentences

FRAMES = (0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 32, 40, 50, 65, 80, 100)
EPSILON = 0.1


def animate(shown: Input, path: Path) -> None:
    """From softmax (0 iterations) to balance: the weights, and what each key receives."""
    figure, axes = style.figure(1, 2, (3.4, 2.8))
    frames = [softmax(shown, EPSILON) if t == 0 else transport(shown, EPSILON, t) for t in FRAMES]
    share = frames[0].shape[0] / frames[0].shape[1]

    def show(k: int) -> list:
        weights = frames[k]
        for axis in axes[0]:
            axis.clear()
        style.draw(axes[0, 0], shown, weights)
        after = f"after {FRAMES[k]} iteration{'s' * (FRAMES[k] > 1)}"
        axes[0, 0].set_title(after if FRAMES[k] else "softmax", fontsize=9)
        received = weights.sum(0) / share
        axes[0, 1].bar(range(len(received)), np.minimum(received, 5), color=style.TRANSPORT, alpha=0.8)
        axes[0, 1].axhline(1, color=style.KEY, linewidth=1)
        axes[0, 1].set_ylim(0, 5)
        axes[0, 1].set_xticks([])
        axes[0, 1].set_title("shares that the keys receive", fontsize=9)
        return []

    made = FuncAnimation(figure, show, frames=len(frames))  # type: ignore[arg-type]
    made.save(path, writer=PillowWriter(fps=3), dpi=90)
    style.plt.close(figure)


def animations(folder: Path) -> None:
    for shown in (points(), sentences()):
        animate(shown, folder / f"{shown.name}-iterations.gif")
