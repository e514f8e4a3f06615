"""The real inputs of the picture book: scores of all pairs, and what the tokens are called."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits, make_moons
from torch import Tensor

from examples.pfam.config import HELDOUT_SAMPLE
from examples.pfam.fixed_score import FixedScores
from examples.pfam.pairs import decode, load_families, make_pair
from examples.pfam.stockholm import read_stockholm

SENTENCES = (
    "the cat sat quietly on the old mat near the door",
    "near the old door a cat was sitting on its mat",
)


@dataclass(frozen=True)
class Input:
    """Two lists of tokens and the score of every pair.

    name: of the folder and the caption.
    scores: [L, S], in a unit in which epsilon = 1 is smooth and 0.05 is sharp.
    rows, cols: labels, or empty.
    row_places, col_places: [L, 2] and [S, 2] where the tokens are points, else None.
    """

    name: str
    scores: Tensor
    rows: tuple[str, ...] = ()
    cols: tuple[str, ...] = ()
    row_places: np.ndarray | None = None
    col_places: np.ndarray | None = None


def _standardised(scores: Tensor) -> Tensor:
    return (scores - scores.mean()) / scores.std()


def _near(a: np.ndarray, b: np.ndarray) -> Tensor:
    """Minus half the squared distances, scaled to unit deviation."""
    return _standardised(-torch.cdist(torch.tensor(a), torch.tensor(b)).square() / 2)


@cache
def digits() -> Input:
    """The ink of two handwritten threes: which stroke of one is which of the other."""
    found = load_digits()
    first, second = (found.images[i] for i in np.flatnonzero(found.target == 3)[[0, 7]])
    places = [np.argwhere(x > 6).astype(float) for x in (first, second)]
    places = [np.stack([p[:, 1], -p[:, 0]], 1) for p in places]
    return Input("digits", _near(*places), row_places=places[0], col_places=places[1])


@cache
def points() -> Input:
    """Two half moons: one sample of points against another, shifted."""
    x, of_moon = make_moons(48, noise=0.06, random_state=0)
    a, b = x[of_moon == 0], x[of_moon == 1] + np.array([-0.35, 0.25])
    return Input("points", _near(a, b), row_places=a, col_places=b)


@cache
def sentences() -> Input:
    """Two sentences of the same meaning: words are alike if they share runs of letters."""
    rows, cols = (tuple(s.split()) for s in SENTENCES)

    def runs(word: str) -> dict[str, float]:
        padded = f"^{word}$"
        found = [padded[i : i + k] for k in (1, 2, 3) for i in range(len(padded) - k + 1)]
        return {x: float(found.count(x)) * len(x) for x in set(found) - {"^", "$"}}

    def alike(a: str, b: str) -> float:
        x, y = runs(a), runs(b)
        dot = sum(x[k] * y.get(k, 0.0) for k in x)
        return dot / (sum(v * v for v in x.values()) * sum(v * v for v in y.values())) ** 0.5

    scores = torch.tensor([[alike(a, b) for b in cols] for a in rows], dtype=torch.float64)
    return Input("sentences", _standardised(scores), rows, cols)


@cache
def proteins() -> Input:
    """Two proteins of one family of the shipped sample: BLOSUM62, averaged along diagonals."""
    families = {family.name: family for family in load_families(read_stockholm(HELDOUT_SAMPLE))}
    family = families["fn3"]
    order = sorted(range(len(family.sequences)), key=lambda i: len(family.sequences[i]))
    pair = make_pair(family, order[2], order[-3])
    scores = torch.from_numpy(FixedScores(reach=6.0, position=20.0).scores(pair))
    return Input("proteins", _standardised(scores), tuple(decode(pair.query)), tuple(decode(pair.key)))


def all_inputs() -> tuple[Input, ...]:
    return digits(), sentences(), points(), proteins()
