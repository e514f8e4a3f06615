"""Loops of evaluation on CPUs, compiled by Numba: what the evidence of pairs of residues is made of.

Each has its definition in tensors beside it, in ``layers.py``, ``parts.py`` or ``model.py``, which training and other
devices run and tests compare with. Compiled code is cached beside this file, or in the user's cache where that is
read-only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .kernels import FloatArray, IntArray
from .loops import loop

_TOGETHER = 128
"""Entries that are judged together, what is known of them in the fastest cache."""


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
    """Of plans [N, L+1, S+1] without their dustbins: sum, sum of squares and largest entry of each row, [N, L, 3], and
    of each column, [N, S, 3]."""
    count, length, size = plan.shape
    rows, columns = plan.new_empty(count, length - 1, 3), plan.new_zeros(count, 3, size - 1)
    _plan_sums(plan.contiguous().numpy(), rows.numpy(), columns.numpy())
    return rows, columns.mT


@loop(error_model="numpy")
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


@loop()
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


@loop(fastmath={"contract"})
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


@loop(fastmath={"reassoc", "contract", "nsz"})
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
