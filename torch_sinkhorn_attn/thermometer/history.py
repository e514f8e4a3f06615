"""How far from balance each iterate of a solve is, the very iterates that the engine goes through."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn.method.reference import stopped_base
from torch_sinkhorn_attn.thermometer.passes import PLAIN, Passes

CHUNK = 32  # iterates that are kept at a time


class History(NamedTuple):
    """movement: `[T+R, N, H, G]`, `Passes.movement` after each iteration. used: `[N, H, G]` int64, the iterations that
    were taken: fewer than T + R where a tolerance ended the base early."""

    movement: Tensor
    used: Tensor


def history(passes: Passes) -> History:
    """A plain base takes one solve of T + R + 1 iterations; one that is over-relaxed or accelerated T solves of a
    single column half-step and T of a row half-step, as the definition combines them."""
    solver = passes.problem.solver
    base, tail = solver.base_iters, solver.tail_iters
    if solver.over_relaxation != 1 or solver.acceleration is not None:
        found = _stepwise(passes, base, tail)
        return History(found, _ended(found, solver.tolerance, base) + tail)
    found = _plain(passes, base, tail, solver.tolerance)
    ended = _ended(found, solver.tolerance, base)
    steps = torch.arange(1, base + tail + 1, device=found.device)[:, None, None, None]
    # A plain run went on where the base stood still, the tail then following from there.
    taken = torch.where(steps <= base, steps.minimum(ended), steps - base + ended)
    return History(found.gather(0, (taken - 1).expand_as(found)), ended + tail)


def _ended(movement: Tensor, tolerance: float, base: int) -> Tensor:
    """The iteration after which each problem's base stands still: T, or the first that leaves it within the
    tolerance."""
    never = torch.full(movement.shape[1:], base, dtype=torch.int64, device=movement.device)
    if base < 2 or not tolerance:
        return never
    small = movement[: base - 1] <= tolerance
    return torch.where(small.any(0), 1 + small.int().argmax(0), never)


def _plain(passes: Passes, base: int, tail: int, tolerance: float) -> Tensor:
    count = base + tail
    found: list[Tensor] = []
    u = v = None
    done = 0
    while done <= count:
        step = min(CHUNK, count + 1 - done)
        stacked = passes.solve(u, v, **PLAIN, tail_iters=step)
        found += [passes.movement(stacked.col[t], stacked.col[t + 1]) for t in range(step)]
        u, v, done = stacked.row[-1], stacked.col[-1], done + step
        if tolerance and done > tail + 1:
            ended = _ended(torch.stack(found[1:]), tolerance, done)
            if bool((ended + tail < done).all()):  # all that is read later is there
                found += [found[-1]] * (count + 1 - done)
                break
    return torch.stack(found)[1:]


def _stepwise(passes: Passes, base: int, tail: int) -> Tensor:
    omega, found = passes.problem.solver.over_relaxation, []

    def column(u: Tensor, v: Tensor) -> Tensor:
        plain = passes.column(u)
        found.append(passes.movement(v, plain))
        return plain if omega == 1 else (1 - omega) * v + omega * plain

    def row(v: Tensor, u: Tensor) -> Tensor:
        plain = passes.row(v)
        return plain if omega == 1 else (1 - omega) * u + omega * plain

    u, v = stopped_base(*passes.start(), column, row, passes.problem)
    found = (found + found[-1:] * base)[:base]  # where all had ended, the base did
    if tail == 0:
        u = passes.row(v)  # as in the plan that is returned
    after = passes.iterates(u, v, tail + 1).col
    found += [passes.movement(after[t], after[t + 1]) for t in range(tail + 1)]
    return torch.stack(found)[1:]
