"""What the compiler adds to a resident kernel in VMEM: a table, made by `benchmarks/vmem.py`.

Registers that the unrolled loops have no room for are spilled. How many depends on the kernel, its options and the
generation, and a program that chooses its kernels has no compiler to ask. `benchmarks/vmem.py` asks it, for strips of
several widths; below stand the most that it found in each, and a program reckons with `MARGIN` times that.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

MARGIN = 1.5  # options and shapes that were not measured: the most seen between two that differ in one is 1.9 for 1.2
# (column blocks of a row block, MiB), and linear between
FORWARD = ((3, 2.7), (8, 3.7), (32, 9.4))
BACKWARD = ((3, 3.3), (8, 4.5), (32, 9.4))


def spilled(width: int, adjoint: bool) -> int:
    """Bytes that a kernel over strips of so many column blocks takes at most beyond operands, results and workspace.

    >>> spilled(3, adjoint=False) / 2**20, spilled(20, adjoint=True) > spilled(8, adjoint=True)
    (4.05, True)
    """
    return round(MARGIN * _between(BACKWARD if adjoint else FORWARD, width) * 2**20)


def _between(table: Sequence[tuple[int, float]], width: int) -> float:
    """Linear between the entries; below the first as the first, and rising beyond the last."""
    if width <= table[0][0]:
        return table[0][1]
    pairs = list(itertools.pairwise(table))
    (left, low), (right, high) = next((pair for pair in pairs if width <= pair[1][0]), pairs[-1])
    return low + (high - low) * (width - left) / (right - left)
