"""The static table: our kernels beside FlashSinkhorn's half-step and softmax attention, as the compiler makes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from torch_sinkhorn_attn.engines.triton.launch import CHIPS, Chip, Launch, recording

from . import gpu_peers, softmax_triton
from .gpu_launches import Case, launches
from .gpu_static import Compiled, compiled
from .measure import print_rows

WIDTH, POINTS = 64, 4096
HEAD = ("kernel", "target", "registers", "spilled", "shared KiB", "tensor", "a score", "most frequent instructions")
WIDTHS = (-44, -7, 9, 7, 10, 6, 7, -60)


class Row(NamedTuple):
    """A line: `each` divides the loop's scores, where a turn is more than one half-step."""

    name: str
    launch: Launch
    scores: int
    work: str = "exp2"
    trips: int = 1


def table(targets: list[str]) -> dict[tuple[str, str], Compiled]:
    """Prints it; by name and target."""
    print_rows([HEAD], WIDTHS)
    found: dict[tuple[str, str], Compiled] = {}
    for target in targets:
        chip = CHIPS[target]
        for row in rows(chip):
            if chip.backend == "hip" and row.name.startswith("FlashSinkhorn"):
                continue
            x = compiled(row.launch, chip, row.scores, row.work, row.trips)
            found[row.name, target] = x
            score = f"{x.per_score:.2f}" if x.loop else "?"
            often = " ".join(f"{name} {n:g}" for name, n in x.opcodes(5).items())
            cells = (str(x.registers), str(x.spilled), f"{x.shared / 1024:.0f}", "yes" if x.tensor else "no", score)
            print_rows([(row.name, target, *cells, often)], WIDTHS)
    if not gpu_peers.installed():
        print("FlashSinkhorn is not installed: pip install flash-sinkhorn")
    return found


def rows(chip: Chip) -> Iterator[Row]:
    yield from ours(chip)
    yield from _softmax(chip)
    if gpu_peers.installed():
        for launch, scores, trips in gpu_peers.launches(POINTS, WIDTH):
            shape = f"{launch.meta['BLOCK_M']} x {launch.meta['BLOCK_N']}, {launch.meta['num_warps']} warps"
            yield Row(f"FlashSinkhorn half-step, {shape}", launch, scores, "exp2", trips)


def ours(chip: Chip) -> Iterator[Row]:
    """Each kernel of a plain problem once, in bfloat16: a short one for the resident kernels, a long one."""
    for case in (Case("short", length=128, width=WIDTH), Case("long", length=POINTS, width=WIDTH)):
        seen: set[str] = set()
        for launch in launches(case, chip):
            name = launch.kernel.__name__
            if name in seen or (shape := tile_of(launch)) is None:
                continue
            seen.add(name)
            work = "vector" if case.name == "short" else "exp2"
            yield Row(f"{name}, {shape[0]} x {shape[1]}", launch, shape[0] * shape[1], work)


def tile_of(launch: Launch) -> tuple[int, int] | None:
    """Lines of the tile that a turn of a kernel's loop works on, by the constants it is compiled for."""
    for x in (*launch.args, *launch.meta.values()):
        if isinstance(x, tuple) and hasattr(x, "outer") and isinstance(x.outer, int):
            return x.outer, x.inner
    return None


def _softmax(chip: Chip) -> Iterator[Row]:
    x = torch.empty(1, 1, POINTS, WIDTH, dtype=torch.bfloat16, device="meta")
    with recording(chip) as found:
        output, log_sum = softmax_triton.forward(x, x, x)
        softmax_triton.backward((x, x, x), output, log_sum, output)
    for launch, name in zip(found, ("forward", "backward, dQ", "backward, dK and dV"), strict=True):
        rows, cols = launch.meta["ROWS"], launch.meta["COLS"]
        yield Row(f"softmax {name}, {rows} x {cols}", launch, rows * cols)
