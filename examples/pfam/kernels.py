"""Loops over pairs of residues that CPUs run compiled, by Numba: the pair HMM's recursion and averages along diagonals.

Each has its definition in tensors beside it, in ``pair_hmm.py`` and ``layers.py``, which other devices run and tests
compare with. Compiled code is cached beside this file, or in the user's cache where that is read-only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]

_TOGETHER = 128
"""Entries that are judged together, what is known of them in the fastest cache."""
BLOCK = 64
"""Columns that share a scale: a gap of so many, or so many pairs of ``MOST`` nats each, stay in a float64's range."""
MOST = 10.0


def forward_weights(
    scores: Tensor, n: Tensor, m: Tensor, start: Tensor, edge: Tensor, inner: Tensor, opening: float, extension: float
) -> tuple[Tensor, Tensor]:
    """Log weight of everything up to and including each pair, [N, L, S], and of all that ends with both sequences'
    last residues, [N]. What follows the lengths is below -1e8, as is what no alignment leads to.

    Args:
        scores: [N, L, S], in nats, up to ``MOST``.
        n, m: lengths, [N].
        start: log weight of beginning before the first residues of both, [N].
        edge, inner: log weights of beginning with a pair that holds a first residue, and with any other, [N]; -1e9 is
            never.
        opening, extension: of a gap's first and each further residue, in nats.
    """
    count, length, size = scores.shape
    weights, totals = torch.empty_like(scores, memory_format=torch.contiguous_format), scores.new_empty(count)
    given = [*(side.long() for side in (n, m)), *(kind.double() for kind in (start, edge, inner))]
    for k in range(count):  # one after the other, for these are of twice the width
        odds = scores[k : k + 1].double().exp_()
        found, scales = torch.zeros_like(odds), odds.new_zeros(1, length, -(-size // BLOCK))
        total = odds.new_empty(1)
        arguments: list[Any] = [x.contiguous().numpy() for x in (odds, *(of[k : k + 1] for of in given))]
        arguments += [opening, extension, found.numpy(), scales.numpy(), total.numpy()]
        _forward_weights(*arguments)
        found.log_().clamp_(min=-1e9)
        for block, of_block in enumerate(scales.unbind(2)):
            found[:, :, block * BLOCK : (block + 1) * BLOCK] += of_block[:, :, None]
        weights[k], totals[k] = found[0], total[0]
    return weights, totals


def turned_maps(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Maps [N, L, S] with the entry (rows[i], columns[j]) at (i, j), for indices [N, L] and [N, S] that fall by one
    from the lengths to 0; zeros where they are negative."""
    found = torch.zeros_like(maps, memory_format=torch.contiguous_format)
    for source, target, n, m in zip(maps, found, (rows[:, 0] + 1).tolist(), (columns[:, 0] + 1).tolist(), strict=True):
        target[:n, :m] = source[:n, :m].flip(0, 1)
    return found


def diagonal_averages(maps: Tensor, widths: tuple[int, ...]) -> Tensor:
    """``layers.diagonal_means`` of maps [N, C, L, S]: [N, len(widths) C, L, S]."""
    count, channels, length, size = maps.shape
    found = maps.new_empty(count, len(widths) * channels, length, size)
    _diagonal_averages(maps.contiguous().numpy(), np.array(widths, dtype=np.int64), found.numpy())
    return found


def averages_at(maps: Tensor, entries: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Maps [N, C, L, S] and their ``layers.diagonal_means`` at some entries, in rising order, given as places in [N L
    S]: [C, entries] and [len(widths) C, entries]."""
    channels = maps.shape[1]
    found = maps.new_empty((1 + len(widths)) * channels, len(entries))
    _averages_at(maps.contiguous().numpy(), entries.numpy(), np.array(widths, dtype=np.int64), found.numpy())
    return found[:channels], found[channels:]


def depthwise(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """A convolution of every channel of [N, L, d] by itself, by weights [d, width], an odd width; zeros beyond the
    ends."""
    found = torch.empty_like(x, memory_format=torch.contiguous_format)
    _depthwise(x.contiguous().numpy(), weight.T.contiguous().numpy(), bias.numpy(), dilation, found.numpy())
    return found


def perceptron(groups: Sequence[Tensor], linear: Tensor, hidden: Tensor, bias: Tensor, score: Tensor) -> Tensor:
    """``layers.PairScore`` of groups [C1, E], [C2, E], ...: linear [C] and hidden [H, C] weights, biases and scores of
    the hidden units [H], to [E]."""
    found = groups[0].new_empty(groups[0].shape[1])
    arguments: list[Any] = [x.contiguous().numpy() for x in (linear, hidden, bias, score, found)]
    _perceptron(tuple(group.contiguous().numpy() for group in groups), *arguments)
    return found


def plan_sums(plan: Tensor) -> tuple[Tensor, Tensor]:
    """Of plans [N, L+1, S+1] without their dustbins: sum, sum of squares and largest entry of each row, [N, L, 3], and of
    each column, [N, S, 3]."""
    count, length, size = plan.shape
    rows, columns = plan.new_empty(count, length - 1, 3), plan.new_zeros(count, 3, size - 1)
    _plan_sums(plan.contiguous().numpy(), rows.numpy(), columns.numpy())
    return rows, columns.mT


@numba.njit(cache=True, nogil=True)
def _forward_weights(
    odds: FloatArray,
    n: IntArray,
    m: IntArray,
    start: FloatArray,
    edge: FloatArray,
    inner: FloatArray,
    opening: float,
    extension: float,
    weights: FloatArray,
    scales: FloatArray,
    totals: FloatArray,
) -> None:
    """``forward_weights`` of ``odds``, exp of the scores: weights over exp of ``scales`` [N, L, blocks], and totals.

        M_ij = odds_ij ((M + X + Y)_(i-1)(j-1) + free_ij)                 a pair
        X_ij = exp(-opening) (M + Y)_(i-1)j + exp(-extension) X_(i-1)j    a query residue alone
        Y_ij = exp(-opening) (M + X)_i(j-1) + exp(-extension) Y_i(j-1)    a key residue alone

    A row is cut into blocks of ``BLOCK``, each with a scale of its own, so that what is exp(-2000) of the best in its
    row is still there, as three thousand residues need it.
    """
    opened, extended = np.exp(-opening), np.exp(-extension)
    blocks = scales.shape[2]
    size = blocks * BLOCK
    # Of column j (from 0) at j + 1; column -1, where no key residue has been read yet, at 0.
    pair, query, key = np.zeros(size + 1), np.zeros(size + 1), np.zeros(size + 1)
    above_any, above_scale, scale = np.zeros(size + 1), np.empty(blocks), np.empty(blocks)
    for k in range(len(odds)):
        rows, columns = n[k], m[k]
        used = (columns + BLOCK - 1) // BLOCK
        pair[:], query[:], key[:] = 0.0, 0.0, 0.0
        # The row above the first: nothing, then key residues alone. `border` is the log weight at column -1.
        border = start[k]
        for block in range(used):
            value = 1.0
            scale[block] = start[k] - opening - extension * (block * BLOCK)
            for j in range(block * BLOCK, min((block + 1) * BLOCK, columns)):
                key[j + 1] = value
                value *= extended
        for i in range(rows):
            above_border = border
            border = start[k] - opening - extension * i
            for block in range(used):
                above_scale[block] = scale[block]
            for j in range(1, columns + 1):
                above_any[j] = pair[j] + query[j] + key[j]
            for block in range(used):
                low, high = block * BLOCK, min((block + 1) * BLOCK, columns)
                # The largest scale of what comes in from above, from the left, and freely.
                if block == 0:
                    corner_scale, corner_any = above_border, 1.0
                    left_scale, left_open, left_key = border, 1.0, 0.0
                else:
                    corner_scale, corner_any = above_scale[block - 1], above_any[low]
                    left_scale, left_open, left_key = scale[block - 1], pair[low] + query[low], key[low]
                here = max(max(above_scale[block], corner_scale), max(left_scale, inner[k]))
                if i == 0 or block == 0:
                    here = max(here, edge[k])
                if here == -np.inf:
                    pair[low + 1 : high + 1], query[low + 1 : high + 1], key[low + 1 : high + 1] = 0.0, 0.0, 0.0
                    weights[k, i, low:high] = 0.0
                    scales[k, i, block] = scale[block] = here
                    continue
                above, left = np.exp(above_scale[block] - here), np.exp(left_scale - here)
                begun = np.exp((edge[k] if i == 0 else inner[k]) - here)
                chance, found = odds[k, i, low:high], weights[k, i, low:high]
                corner, here_pair = above_any[low:high], pair[low + 1 : high + 1]
                here_query, here_key = query[low + 1 : high + 1], key[low + 1 : high + 1]
                up, across = above * opened, above * extended
                for j in range(high - low):
                    here_query[j] = up * (here_pair[j] + here_key[j]) + across * here_query[j]
                for j in range(1, high - low):
                    here_pair[j] = chance[j] * (above * corner[j] + begun)
                if block == 0:
                    begun = np.exp(edge[k] - here)
                here_pair[0] = chance[0] * (np.exp(corner_scale - here) * corner_any + begun)
                last, ready = left * left_key, left * left_open
                for j in range(high - low):
                    last = opened * ready + extended * last
                    ready = here_pair[j] + here_query[j]
                    here_key[j] = last
                largest = 0.0
                for j in range(high - low):
                    found[j] = here_pair[j]
                    largest = max(largest, here_pair[j] + here_query[j] + here_key[j])
                scales[k, i, block] = here
                if largest == 0:
                    here = -np.inf
                elif largest > 1e20 or largest < 1e-20:
                    for j in range(high - low):
                        here_pair[j] /= largest
                        here_query[j] /= largest
                        here_key[j] /= largest
                    here += np.log(largest)
                scale[block] = here
        last = pair[columns] + query[columns] + key[columns]
        totals[k] = np.log(last) + scale[used - 1] if last > 0 else -1e9


@numba.njit(cache=True, nogil=True, error_model="numpy")
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


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _averages_at(maps: FloatArray, entries: IntArray, widths: IntArray, found: FloatArray) -> None:
    """``averages_at`` into ``found``, the maps first.

    Sums of sums along each diagonal, in float64: the second difference of them, over a distance of w, is the sum by the
    triangle's weights. Beyond its last entry a diagonal's sum of sums grows by its sum. Rows are kept as long as they
    are read; entries that stand side by side are averaged together.
    """
    count, channels, length, size = maps.shape
    most = widths.max()
    margin, kept = most + 1, 2 * most + 1
    wide = size + most
    sums = np.empty(length + size + 2 * most)  # of diagonal j - i + length + most - 1
    twice = np.zeros((kept + 1, margin + wide + most))  # row i in i % kept; the last is zero, as what stands before
    of_runs = np.empty((3, len(entries)), dtype=np.int64)
    starts, places, ends = of_runs[0], of_runs[1], of_runs[2]
    first = 0
    for k in range(count):
        runs = 0
        base = k * length * size
        while first < len(entries) and entries[first] < base + length * size:
            place = entries[first] - base
            longest = size - place % size
            starts[runs], places[runs] = first, place
            first += 1
            while first < len(entries) and entries[first] - base == place + first - starts[runs]:
                if first - starts[runs] == longest:
                    break
                first += 1
            ends[runs] = first
            runs += 1
        if runs == 0:
            continue
        for channel in range(channels):
            source = maps[k, channel]
            sums[:] = 0.0
            run = 0
            for row in range(length + most - 1):
                total = sums[length + most - 1 - row : length + most - 1 - row + wide]
                above = twice[(row - 1) % kept if row > 0 else kept, margin - 1 : margin - 1 + wide]
                here = twice[row % kept, margin : margin + wide]
                if row < length:
                    added = source[row]
                    for j in range(size):
                        total[j] += added[j]
                for j in range(wide):
                    here[j] = above[j] + total[j]
                i = row - (most - 1)
                while run < runs and places[run] < (i + 1) * size:
                    j, many = places[run] - i * size, ends[run] - starts[run]
                    found[channel, starts[run] : ends[run]] = source[i, j : j + many]
                    left = margin + j - 1
                    middle = twice[(i - 1) % kept if i > 0 else kept, left : left + many]
                    for index in range(len(widths)):
                        width = widths[index]
                        low, high = i - 1 - width, i - 1 + width
                        before = twice[low % kept if low >= 0 else kept, left - width : left - width + many]
                        after = twice[high % kept, left + width : left + width + many]
                        to = found[(1 + index) * channels + channel, starts[run] : ends[run]]
                        factor = 1.0 / (width * width)
                        for e in range(many):
                            to[e] = (after[e] - 2.0 * middle[e] + before[e]) * factor
                    run += 1


@numba.njit(cache=True, nogil=True)
def _depthwise(x: FloatArray, weight: FloatArray, bias: FloatArray, dilation: int, found: FloatArray) -> None:
    """``depthwise`` into ``found``, by weights [width, d]."""
    count, length, size = x.shape
    for k in range(count):
        for i in range(length):
            to = found[k, i]
            to[:] = bias
            for index in range(len(weight)):
                at = i + (index - len(weight) // 2) * dilation
                if 0 <= at < length:
                    of, by = x[k, at], weight[index]
                    for c in range(size):
                        to[c] += by[c] * of[c]


@numba.njit(cache=True, nogil=True, fastmath={"contract"})
def _perceptron(
    groups: tuple[FloatArray, ...],
    linear: FloatArray,
    hidden: FloatArray,
    bias: FloatArray,
    score: FloatArray,
    found: FloatArray,
) -> None:
    """``perceptron`` into ``found``: four inputs at a time, so that sums are read and written less often."""
    inputs = len(linear)
    quads = (inputs + 3) // 4
    weights = np.zeros((len(bias) + 1, 4 * quads), dtype=found.dtype)
    weights[: len(bias), :inputs], weights[len(bias), :inputs] = hidden, linear
    known = np.zeros((4 * quads, _TOGETHER), dtype=found.dtype)
    total, unit = np.empty(_TOGETHER, dtype=found.dtype), np.empty(_TOGETHER, dtype=found.dtype)
    for start in range(0, len(found), _TOGETHER):
        many = min(_TOGETHER, len(found) - start)
        c = 0
        for group in groups:
            for row in range(len(group)):
                known[c, :many] = group[row, start : start + many]
                c += 1
        total[:] = 0.0
        for h in range(len(bias) + 1):
            unit[:] = bias[h] if h < len(bias) else 0.0
            of = weights[h]
            for quad in range(quads):
                c = 4 * quad
                w0, w1, w2, w3 = of[c], of[c + 1], of[c + 2], of[c + 3]
                x0, x1, x2, x3 = known[c], known[c + 1], known[c + 2], known[c + 3]
                for e in range(_TOGETHER):
                    unit[e] = unit[e] + w0 * x0[e] + w1 * x1[e] + w2 * x2[e] + w3 * x3[e]
            if h < len(bias):
                by, none = score[h], unit[0] - unit[0]
                for e in range(_TOGETHER):
                    total[e] += by * max(unit[e], none)
            else:
                for e in range(_TOGETHER):
                    total[e] += unit[e]
        found[start : start + many] = total[:many]


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _plan_sums(plan: FloatArray, rows: FloatArray, columns: FloatArray) -> None:
    """``plan_sums`` into ``rows`` and, [N, 3, S], into ``columns``, which are zeros."""
    for k in range(len(plan)):
        total, squares, largest = columns[k, 0], columns[k, 1], columns[k, 2]
        for i in range(plan.shape[1] - 1):
            line = plan[k, i]
            mass, square, most = line[0] - line[0], line[0] - line[0], line[0]
            for j in range(len(total)):
                value = line[j]
                mass += value
                square += value * value
                most = max(most, value)
                total[j] += value
                squares[j] += value * value
                largest[j] = max(largest[j], value)
            rows[k, i, 0], rows[k, i, 1], rows[k, i, 2] = mass, square, most
