"""What the compiler adds to a resident kernel in VMEM: a table, made by `benchmarks/vmem.py`.

Registers that the unrolled loops have no room for are spilled. How many depends on the kernel, its options and the
generation, and a program that chooses its kernels has no compiler to ask. `benchmarks/vmem.py` asks it, for strips of
several widths, twice around their loops. In longer loops up to three times as much was seen of a kernel that spills
little, and never twice the most of its width: so below stands twice that most, rounded up, and at the widest strip no
less than the 14 MiB that all kernels were held to before. A program reckons with `MARGIN` times the table.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

MARGIN = 1.5  # options, lengths and generations that were not measured
# (column blocks of a row block, MiB), and linear between
FORWARD = ((3, 4.0), (8, 4.5), (32, 9.4))
BACKWARD = ((3, 6.0), (8, 6.0), (32, 9.4))


def spilled(width: int, adjoint: bool) -> int:
    """Bytes that a kernel over strips of so many column blocks takes at most beyond operands, results and workspace.

    >>> spilled(3, adjoint=False) >> 20, spilled(32, adjoint=True) >> 20
    (6, 14)
    """
    return round(MARGIN * _between(BACKWARD if adjoint else FORWARD, width) * 2**20)


def _between(table: Sequence[tuple[int, float]], width: int) -> float:
    """Linear between the entries; below the first as the first, and rising beyond the last."""
    if width <= table[0][0]:
        return table[0][1]
    pairs = list(itertools.pairwise(table))
    (left, low), (right, high) = next((pair for pair in pairs if width <= pair[1][0]), pairs[-1])
    return low + (high - low) * (width - left) / (right - left)
