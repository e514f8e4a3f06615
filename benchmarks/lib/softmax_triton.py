"""Softmax attention written plainly in Triton, as FlashAttention-2 does it, for our kernels to stand beside.

`[N, H, L, E]` contiguous, L and S of any size, E a power of two. The forward keeps log2 of each row's sum; the backward
is a kernel for dQ and one for dK and dV, each of which makes the tiles again. Lengths that the blocks divide are not
masked (`EVEN`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_sinkhorn_attn.engines.triton.launch import launch

LOG2_E = 1.4426950408889634
Shape = tuple[int, int, int, int]  # rows, columns, warps, stages
SHAPES: dict[str, Shape] = {"forward": (128, 64, 4, 3), "dq": (128, 64, 8, 2), "dkv": (64, 128, 8, 2)}


@triton.jit
def _offsets(start, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """`[BLOCK, WIDTH]`, of a block of lines."""
    return (start + tl.arange(0, BLOCK))[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _lines(at, start, lines, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """A block of lines `[BLOCK, WIDTH]`, zero past the end."""
    if EVEN:
        return tl.load(at + _offsets(start, WIDTH, BLOCK))
    there = (start + tl.arange(0, BLOCK) < lines)[:, None]
    return tl.load(at + _offsets(start, WIDTH, BLOCK), mask=there, other=0.0)


@triton.jit
def _kept(scores, start, size, COLS: tl.constexpr, EVEN: tl.constexpr):
    """-inf for keys past the end."""
    if EVEN:
        return scores
    return tl.where((start + tl.arange(0, COLS) < size)[None, :], scores, float("-inf"))


@triton.jit
def forward_kernel(
    query, key, value, output, log_sum, factor, length, size,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Rows of the output and log2 of their sums of exp2(factor * q.k)."""
    head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * ROWS
    q = _lines(query + head * length * WIDTH, first, length, WIDTH, ROWS, EVEN)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mean = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, size, COLS):
        k = _lines(key + head * size * WIDTH, start, size, WIDTH, COLS, EVEN)
        v = _lines(value + head * size * WIDTH, start, size, WIDTH, COLS, EVEN)
        scores = _kept(tl.dot(q, k.T, input_precision="ieee"), start, size, COLS, EVEN)
        larger = tl.maximum(most, tl.max(scores, 1) * factor)
        weight = tl.exp2(scores * factor - larger[:, None])
        decay = tl.exp2(most - larger)
        total = total * decay + tl.sum(weight, 1)
        mean = mean * decay[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        most = larger
    at = first + tl.arange(0, ROWS)
    tl.store(log_sum + head * length + at, most + tl.log2(total), mask=at < length)
    there = (at < length)[:, None]
    tl.store(output + head * length * WIDTH + _offsets(first, WIDTH, ROWS), mean / total[:, None], mask=there)


@triton.jit
def dq_kernel(
    query, key, value, grad, log_sum, inner, dq, factor, scale, length, size,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Rows of dQ; `inner` is each row's output . grad."""
    head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * ROWS
    q = _lines(query + head * length * WIDTH, first, length, WIDTH, ROWS, EVEN)
    g = _lines(grad + head * length * WIDTH, first, length, WIDTH, ROWS, EVEN)
    at = first + tl.arange(0, ROWS)
    sums = tl.load(log_sum + head * length + at, mask=at < length, other=0.0)
    drop = tl.load(inner + head * length + at, mask=at < length, other=0.0)
    found = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, size, COLS):
        k = _lines(key + head * size * WIDTH, start, size, WIDTH, COLS, EVEN)
        v = _lines(value + head * size * WIDTH, start, size, WIDTH, COLS, EVEN)
        scores = _kept(tl.dot(q, k.T, input_precision="ieee"), start, size, COLS, EVEN)
        weight = tl.exp2(scores * factor - sums[:, None])
        cotangent = weight * (tl.dot(g, v.T, input_precision="ieee") - drop[:, None])
        found += tl.dot(cotangent.to(k.dtype), k, input_precision="ieee")
    tl.store(dq + head * length * WIDTH + _offsets(first, WIDTH, ROWS), found * scale, mask=(at < length)[:, None])


@triton.jit
def dkv_kernel(
    query, key, value, grad, log_sum, inner, dk, dv, factor, scale, length, size,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Rows of dK and dV: a block of COLS keys, tiles transposed."""
    head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * COLS
    k = _lines(key + head * size * WIDTH, first, size, WIDTH, COLS, EVEN)
    v = _lines(value + head * size * WIDTH, first, size, WIDTH, COLS, EVEN)
    found_k = tl.zeros((COLS, WIDTH), tl.float32)
    found_v = tl.zeros((COLS, WIDTH), tl.float32)
    for start in range(0, length, ROWS):
        q = _lines(query + head * length * WIDTH, start, length, WIDTH, ROWS, EVEN)
        g = _lines(grad + head * length * WIDTH, start, length, WIDTH, ROWS, EVEN)
        at = start + tl.arange(0, ROWS)
        if EVEN:
            sums, drop = tl.load(log_sum + head * length + at), tl.load(inner + head * length + at)
        else:
            sums = tl.load(log_sum + head * length + at, mask=at < length, other=float("inf"))
            drop = tl.load(inner + head * length + at, mask=at < length, other=0.0)
        weight = tl.exp2(tl.dot(k, q.T, input_precision="ieee") * factor - sums[None, :])
        found_v += tl.dot(weight.to(g.dtype), g, input_precision="ieee")
        cotangent = weight * (tl.dot(v, g.T, input_precision="ieee") - drop[None, :])
        found_k += tl.dot(cotangent.to(q.dtype), q, input_precision="ieee")
    place = head * size * WIDTH + _offsets(first, WIDTH, COLS)
    there = (first + tl.arange(0, COLS) < size)[:, None]
    tl.store(dk + place, found_k * scale, mask=there)
    tl.store(dv + place, found_v, mask=there)


def _meta(name: str, query: Tensor, key: Tensor, shapes: dict[str, Shape]) -> dict[str, Any]:
    rows, cols, warps, stages = shapes[name]
    even = query.shape[2] % rows == 0 and key.shape[2] % cols == 0
    constants = {"WIDTH": query.shape[3], "ROWS": rows, "COLS": cols, "EVEN": even}
    return constants | {"num_warps": warps, "num_stages": stages}


def forward(query: Tensor, key: Tensor, value: Tensor, shapes: dict[str, Shape] = SHAPES) -> tuple[Tensor, Tensor]:
    """The output `[N, H, L, E]` and log2 of the rows' sums `[N, H, L]`, in float32."""
    num, heads, length, width = query.shape
    output, log_sum = torch.empty_like(query), query.new_empty((num, heads, length), dtype=torch.float32)
    meta = _meta("forward", query, key, shapes)
    grid = (triton.cdiv(length, meta["ROWS"]), num * heads)
    factor = LOG2_E / width**0.5
    launch(forward_kernel, grid, query, key, value, output, log_sum, factor, length, key.shape[2], **meta)
    return output, log_sum


def backward(
    inputs: tuple[Tensor, Tensor, Tensor],
    output: Tensor,
    log_sum: Tensor,
    grad: Tensor,
    shapes: dict[str, Shape] = SHAPES,
) -> tuple[Tensor, Tensor, Tensor]:
    """The cotangents of query, key and value, from what `forward` returned and the cotangent of its output."""
    query, key, value = inputs
    num, heads, length, width = query.shape
    inner = (output.float() * grad.float()).sum(-1)
    found = [torch.empty_like(x) for x in inputs]
    scale = width**-0.5
    numbers = (scale * LOG2_E, scale, length, key.shape[2])
    meta = _meta("dq", query, key, shapes)
    grid = (triton.cdiv(length, meta["ROWS"]), num * heads)
    launch(dq_kernel, grid, query, key, value, grad, log_sum, inner, found[0], *numbers, **meta)
    meta = _meta("dkv", query, key, shapes)
    grid = (triton.cdiv(key.shape[2], meta["COLS"]), num * heads)
    launch(dkv_kernel, grid, query, key, value, grad, log_sum, inner, found[1], found[2], *numbers, **meta)
    return found[0], found[1], found[2]
