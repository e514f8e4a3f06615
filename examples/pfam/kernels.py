"""Loops over pairs of residues that CPUs run compiled, by Numba: the pair HMM's recursion and averages along diagonals.

Each has its definition in tensors beside it, in ``pair_hmm.py`` and ``layers.py``, which other devices run and tests
compare with. Compiled code is cached beside this file, or in the user's cache where that is read-only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .loops import loop

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]
Gap = tuple[float, float]
"""What a gap's first and each further residue costs, in nats."""

BLOCK = 64
"""Columns that share a scale: a gap of so many, or so many pairs of ``MOST`` nats each, stay in a float64's range."""
MOST = 10.0
TOGETHER = 150_000
"""Pairs of residues that one call of the sweep is given, or a single pair of sequences."""


def forward_weights(
    scores: Tensor, n: Tensor, m: Tensor, start: Tensor, edge: Tensor, inner: Tensor, gaps: tuple[Gap, Gap]
) -> tuple[Tensor, Tensor]:
    """Log weight of everything up to and including each pair, [N, L, S], and of all that ends with both sequences'
    last residues, [N]. What follows the lengths is below -1e8, as is what no alignment leads to.

    Args:
        scores: [N, L, S], in nats, up to ``MOST``.
        n, m: lengths, [N].
        start: log weight of beginning before the first residues of both, [N].
        edge, inner: log weights of beginning with a pair that holds a first residue, and with any other, [N]; -1e9 is
            never.
        gaps: short ones and long ones.
    """
    count, length, size = scores.shape
    weights, totals = torch.empty_like(scores, memory_format=torch.contiguous_format), scores.new_empty(count)
    given = [*(side.long() for side in (n, m)), *(kind.double() for kind in (start, edge, inner))]
    some = max(TOGETHER // (length * size), 1)
    for first in range(0, count, some):  # a few at a time, for these are of twice the width
        here = slice(first, first + some)
        odds = scores[here].double().exp_()
        found, scales = torch.zeros_like(odds), odds.new_zeros(len(odds), length, -(-size // BLOCK))
        total = odds.new_empty(len(odds))
        arguments: list[Any] = [x.contiguous().numpy() for x in (odds, *(of[here] for of in given))]
        arguments += [*gaps[0], *gaps[1], found.numpy(), scales.numpy(), total.numpy()]
        _forward_weights(*arguments)
        found.log_().clamp_(min=-1e9)
        for block, of_block in enumerate(scales.unbind(2)):
            found[:, :, block * BLOCK : (block + 1) * BLOCK] += of_block[:, :, None]
        weights[here], totals[here] = found, total
    return weights, totals


def turned_maps(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Maps [N, L, S] with the entry (rows[i], columns[j]) at (i, j), for indices [N, L] and [N, S] that fall by one
    from the lengths to 0; zeros where they are negative."""
    found = torch.zeros_like(maps, memory_format=torch.contiguous_format)
    _turned_maps(maps.contiguous().numpy(), (rows[:, 0] + 1).numpy(), (columns[:, 0] + 1).numpy(), found.numpy())
    return found


def diagonal_averages(maps: Tensor, widths: tuple[int, ...]) -> Tensor:
    """``layers.diagonal_means`` of maps [N, C, L, S]: [N, len(widths) C, L, S]."""
    count, channels, length, size = maps.shape
    found = maps.new_empty(count, len(widths) * channels, length, size)
    _diagonal_averages(maps.contiguous().numpy(), np.array(widths, dtype=np.int64), found.numpy())
    return found


@loop()
def _turned_maps(maps: FloatArray, n: IntArray, m: IntArray, found: FloatArray) -> None:
    """``turned_maps`` into ``found``, zeros, for lengths ``n`` and ``m``."""
    for k in range(len(maps)):
        for i in range(n[k]):
            source, target, last = maps[k, n[k] - 1 - i], found[k, i], m[k] - 1
            for j in range(m[k]):
                target[j] = source[last - j]


@loop()
def _forward_weights(
    odds: FloatArray,
    n: IntArray,
    m: IntArray,
    start: FloatArray,
    edge: FloatArray,
    inner: FloatArray,
    opening: float,
    extension: float,
    long_opening: float,
    long_extension: float,
    weights: FloatArray,
    scales: FloatArray,
    totals: FloatArray,
) -> None:
    """``forward_weights`` of ``odds``, exp of the scores: weights over exp of ``scales`` [N, L, blocks], and totals.

        M_ij = odds_ij ((M + X + X' + Y + Y')_(i-1)(j-1) + free_ij)           a pair
        X_ij = exp(-opening) (M + Y + Y')_(i-1)j + exp(-extension) X_(i-1)j   a query residue alone
        Y_ij = exp(-opening) (M + X + X')_i(j-1) + exp(-extension) Y_i(j-1)   a key residue alone

    and X', Y' likewise, of long gaps.

    A row is cut into blocks of ``BLOCK``, each with a scale of its own, so that what is exp(-2000) of the best in its
    row is still there, as three thousand residues need it.
    """
    opened, extended = np.exp(-opening), np.exp(-extension)
    long_opened, long_extended = np.exp(-long_opening), np.exp(-long_extension)
    blocks = scales.shape[2]
    size = blocks * BLOCK
    # Of column j (from 0) at j + 1; column -1, where no key residue has been read yet, at 0.
    pair, query, key = np.zeros(size + 1), np.zeros(size + 1), np.zeros(size + 1)
    long_query, long_key = np.zeros(size + 1), np.zeros(size + 1)
    above_any, above_scale, scale = np.zeros(size + 1), np.empty(blocks), np.empty(blocks)
    for k in range(len(odds)):
        rows, columns = n[k], m[k]
        used = (columns + BLOCK - 1) // BLOCK
        pair[:], query[:], key[:], long_query[:], long_key[:] = 0.0, 0.0, 0.0, 0.0, 0.0
        # The row above the first: nothing, then key residues alone. `border` is the log weight at column -1.
        border = start[k]
        for block in range(used):
            low = block * BLOCK
            short, long = opening + extension * low, long_opening + long_extension * low
            least = min(short, long)
            scale[block] = start[k] - least
            value, long_value = np.exp(least - short), np.exp(least - long)
            for j in range(low, min(low + BLOCK, columns)):
                key[j + 1], long_key[j + 1] = value, long_value
                value *= extended
                long_value *= long_extended
        for i in range(rows):
            above_border = border
            short, long = opening + extension * i, long_opening + long_extension * i
            border = start[k] - min(short, long) + np.log1p(np.exp(-abs(short - long)))
            for block in range(used):
                above_scale[block] = scale[block]
            for j in range(1, columns + 1):
                above_any[j] = pair[j] + query[j] + key[j] + long_query[j] + long_key[j]
            for block in range(used):
                low, high = block * BLOCK, min((block + 1) * BLOCK, columns)
                # The largest scale of what comes in from above, from the left, and freely.
                if block == 0:
                    corner_scale, corner_any = above_border, 1.0
                    left_scale, left_open, left_key, left_long = border, 1.0, 0.0, 0.0
                else:
                    corner_scale, corner_any = above_scale[block - 1], above_any[low]
                    left_scale, left_key, left_long = scale[block - 1], key[low], long_key[low]
                    left_open = pair[low] + query[low] + long_query[low]
                here = max(max(above_scale[block], corner_scale), max(left_scale, inner[k]))
                if i == 0 or block == 0:
                    here = max(here, edge[k])
                here_pair = pair[low + 1 : high + 1]
                here_query, here_key = query[low + 1 : high + 1], key[low + 1 : high + 1]
                here_long_query, here_long_key = long_query[low + 1 : high + 1], long_key[low + 1 : high + 1]
                if here == -np.inf:
                    here_pair[:], here_query[:], here_key[:] = 0.0, 0.0, 0.0
                    here_long_query[:], here_long_key[:] = 0.0, 0.0
                    weights[k, i, low:high] = 0.0
                    scales[k, i, block] = scale[block] = here
                    continue
                above, left = np.exp(above_scale[block] - here), np.exp(left_scale - here)
                begun = np.exp((edge[k] if i == 0 else inner[k]) - here)
                chance, found, corner = odds[k, i, low:high], weights[k, i, low:high], above_any[low:high]
                up, across = above * opened, above * extended
                long_up, long_across = above * long_opened, above * long_extended
                for j in range(high - low):
                    ready = here_pair[j] + here_key[j] + here_long_key[j]
                    here_query[j] = up * ready + across * here_query[j]
                    here_long_query[j] = long_up * ready + long_across * here_long_query[j]
                for j in range(1, high - low):
                    here_pair[j] = chance[j] * (above * corner[j] + begun)
                if block == 0:
                    begun = np.exp(edge[k] - here)
                here_pair[0] = chance[0] * (np.exp(corner_scale - here) * corner_any + begun)
                last, long_last, ready = left * left_key, left * left_long, left * left_open
                for j in range(high - low):
                    last = opened * ready + extended * last
                    long_last = long_opened * ready + long_extended * long_last
                    ready = here_pair[j] + here_query[j] + here_long_query[j]
                    here_key[j], here_long_key[j] = last, long_last
                largest = 0.0
                for j in range(high - low):
                    found[j] = here_pair[j]
                    alone = here_query[j] + here_key[j] + here_long_query[j] + here_long_key[j]
                    largest = max(largest, here_pair[j] + alone)
                scales[k, i, block] = here
                if largest == 0:
                    here = -np.inf
                elif largest > 1e20 or largest < 1e-20:
                    for j in range(high - low):
                        here_pair[j] /= largest
                        here_query[j] /= largest
                        here_key[j] /= largest
                        here_long_query[j] /= largest
                        here_long_key[j] /= largest
                    here += np.log(largest)
                scale[block] = here
        last = pair[columns] + query[columns] + key[columns] + long_query[columns] + long_key[columns]
        totals[k] = np.log(last) + scale[used - 1] if last > 0 else -1e9


@loop(error_model="numpy")
def _diagonal_averages(maps: FloatArray, widths: IntArray, found: FloatArray) -> None:
    """``diagonal_averages`` into ``found``.

    Weights that fall linearly to zero, a triangle of width w: from row i - 1 to i, its sum along a diagonal grows by a
    slope, which gains the entry w ahead, less twice the entry at i - 1, plus the entry w behind. Both are kept in
    float64 for all diagonals at once, and rows are read as they lie in memory.
    """
    count, channels, length, size = maps.shape
    slope, total = np.empty(size + length), np.empty(size + length)
    for k in range(count):
        for channel in range(channels):
            source = maps[k, channel]
            for index in range(len(widths)):
                width = widths[index]
                target = found[k, index * channels + channel]
                factor = 1.0 / (width * width)
                slope[:], total[:] = 0.0, 0.0  # of diagonal j - i + length - 1
                for i in range(1 - width, length):
                    for term in range(3):
                        row = i - 1 + (1 - term) * width
                        if 0 <= row < length:
                            entries = source[row]
                            part = slope[length - 1 - row : length - 1 - row + size]
                            if term == 1:
                                for j in range(size):
                                    part[j] -= 2.0 * entries[j]
                            else:
                                for j in range(size):
                                    part[j] += entries[j]
                    # Diagonals that end above this row are done; those that begin far below have nothing yet.
                    low = max(length - 1 - i - width, 0)
                    high = min(length - 1 - i + size, size + length)
                    slopes, totals = slope[low:high], total[low:high]
                    for d in range(high - low):
                        totals[d] += slopes[d]
                    if i >= 0:
                        sums, out = total[length - 1 - i : length - 1 - i + size], target[i]
                        for j in range(size):
                            out[j] = sums[j] * factor
