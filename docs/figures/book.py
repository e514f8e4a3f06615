"""The picture book: softmax and transport on the same inputs; epsilon, T, window and dustbin, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from docs.figures import style
from docs.figures.inputs import Input, all_inputs
from torch_sinkhorn_attn import Dustbin, sinkhorn_plan

EPSILONS = (0.05, 0.2, 1.0, 5.0)
ITERATIONS = (1, 5, 20, 200)
SHARP = {"digits": 0.05, "sentences": 0.2, "points": 0.1, "proteins": 0.05}
UNMATCHED = {"sentences": 0.75, "proteins": 0.98}  # the dustbin's score, as a quantile of all scores
WINDOWS = {"sentences": (3, 3), "proteins": (8, 8)}
SIZES = {"sentences": (2.6, 2.5), "proteins": (2.5, 2.5), "points": (2.7, 1.9), "digits": (2.7, 1.9)}


def softmax(shown: Input, epsilon: float) -> np.ndarray:
    return (shown.scores / epsilon).softmax(-1).numpy()


def transport(shown: Input, epsilon: float, iterations: int = 400, **options: Any) -> np.ndarray:
    """The plan with rows that sum to 1."""
    options = {"base_iters": iterations - 1, "tail_iters": 1} | options
    plan: np.ndarray = sinkhorn_plan(shown.scores, epsilon=epsilon, **options).numpy()
    return plan


def of_epsilon(shown: Input) -> Figure:
    figure, axes = style.figure(2, len(EPSILONS), SIZES[shown.name])
    for j, epsilon in enumerate(EPSILONS):
        for i, (name, weights) in enumerate(
            (("softmax", softmax(shown, epsilon)), ("transport", transport(shown, epsilon)))
        ):
            style.draw(axes[i, j], shown, weights)
            axes[i, j].set_title(f"{name}, epsilon = {epsilon:g}", fontsize=9)
    return figure


def of_iterations(shown: Input) -> Figure:
    figure, axes = style.figure(2, len(ITERATIONS), SIZES[shown.name])
    for j, iterations in enumerate(ITERATIONS):
        weights = transport(shown, SHARP[shown.name], iterations)
        style.draw(axes[0, j], shown, weights)
        axes[0, j].set_title(f"{iterations} iteration{'s' * (iterations > 1)}", fontsize=9)
        share = weights.shape[0] / weights.shape[1]
        received = weights.sum(0) / share
        axes[1, j].bar(range(len(received)), received, color=style.TRANSPORT, alpha=0.8)
        axes[1, j].axhline(1, color=style.KEY, linewidth=1)
        axes[1, j].set_ylim(0, 2)
        axes[1, j].set_xticks([])
        axes[1, j].set_title(f"keys receive {received.min():.2f} to {received.max():.2f} shares", fontsize=9)
    return figure


def of_supports(shown: Input) -> Figure:
    """Window and dustbin, on and off."""
    scores = float(np.quantile(shown.scores.numpy(), UNMATCHED[shown.name]))
    kinds: dict[str, dict[str, Any]] = {
        "neither": {},
        f"a window of {WINDOWS[shown.name]}": {"window": WINDOWS[shown.name]},
        "a dustbin": {"dustbin": Dustbin(scores, scores)},
        "both": {"window": WINDOWS[shown.name], "dustbin": Dustbin(scores, scores)},
    }
    figure, axes = style.figure(1, len(kinds), SIZES[shown.name])
    for axis, (name, options) in zip(axes[0], kinds.items(), strict=True):
        style.draw(axis, shown, np.minimum(transport(shown, SHARP[shown.name], **options), 1.0))
        axis.set_title(name, fontsize=9)
    return figure


def pictures() -> Iterator[tuple[str, Figure]]:
    for shown in all_inputs():
        yield f"{shown.name}-epsilon", of_epsilon(shown)
        yield f"{shown.name}-iterations", of_iterations(shown)
        if shown.name in WINDOWS:  # a window follows an order: points and ink have none
            yield f"{shown.name}-supports", of_supports(shown)
