"""Which gap costs suit a set of families: both alignment programs over a grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from examples.common.tables import table

from .baselines import needleman_wunsch, smith_waterman
from .evaluate import Scores, measure_alignment
from .pairs import Pair

OPEN = tuple(float(cost) for cost in range(8, 21))
EXTEND = (0.5, 1.0, 1.5, 2.0)
PROGRAMS = {"Needleman-Wunsch": needleman_wunsch, "Smith-Waterman": smith_waterman}


def gap_grid(pairs: Sequence[Pair], progress: bool = True) -> dict[str, np.ndarray]:
    """Macro F1 of each program with BLOSUM62, [len(OPEN), len(EXTEND)]: the gap's first residue costs OPEN."""
    found = {name: np.zeros((len(OPEN), len(EXTEND))) for name in PROGRAMS}
    with tqdm(total=2 * len(OPEN) * len(EXTEND), desc="gap grid", leave=False, disable=not progress) as bar:
        for name, align in PROGRAMS.items():
            for at in np.ndindex(found[name].shape):
                gap = OPEN[at[0]], EXTEND[at[1]]
                results = [measure_alignment(pair, align(pair.query, pair.key, gap)) for pair in pairs]
                found[name][at] = Scores.of(results).macro["f1"]
                bar.update()
    return found


def grid_table(found: dict[str, np.ndarray]) -> str:
    """The grids of ``gap_grid`` as text, the best of each named."""
    parts = []
    for name, grid in found.items():
        rows = [[f"{cost:g}", *(f"{value:.4f}" for value in row)] for cost, row in zip(OPEN, grid, strict=True)]
        parts.append(table([f"{name}: F1, first residue", *(f"each further {cost:g}" for cost in EXTEND)], rows))
        first, further = np.unravel_index(grid.argmax(), grid.shape)
        parts.append(f"best: {OPEN[first]:g} and {EXTEND[further]:g} with {grid.max():.4f}")
    return "\n\n".join(parts)
