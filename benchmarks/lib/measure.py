"""Inputs, a training step, and times taken in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def leaves(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Gaussian query, key and value that require grad, the same at every call."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g).to(dtype).requires_grad_() for _ in range(3)]


def step(inputs: list[Tensor], function: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """Forward and backward: the output and the query's gradient of sum(sin(output))."""
    out = function(*inputs)
    return out.detach(), torch.autograd.grad(out.sin().sum(), inputs)[0]


def best_times(
    functions: dict[str, Callable[[], object]],
    repeat: int,
    enough: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Seconds by the clock, the best of `repeat` rounds in which the functions take turns; one that has taken `enough`
    seconds in all sits out the rounds left."""
    best = dict.fromkeys(functions, float("inf"))
    spent = dict.fromkeys(functions, 0.0)
    for _ in range(repeat):
        for name, function in functions.items():
            if spent[name] < enough:
                start = clock()
                function()
                seconds = clock() - start
                spent[name] += seconds
                best[name] = min(best[name], seconds)
    return best


def relative(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y).norm() / y.norm())


def print_rows(rows: Iterable[Sequence[str]], widths: Sequence[int]) -> None:
    """Lines of right-justified cells; a negative width justifies left."""
    for row in rows:
        cells = (cell.ljust(-w) if w < 0 else cell.rjust(w) for cell, w in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip(), flush=True)
