"""The static table: our kernels beside FlashSinkhorn's half-step and softmax attention, as the compiler makes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from torch_sinkhorn_attn.engines.triton.launch import CHIPS, Chip, Launch, recording

from . import gpu_peers, softmax_triton
from .gpu_launches import Case, distinct, launches
from .gpu_static import Compiled, compiled
from .measure import print_rows

WIDTH, POINTS = 64, 4096
HEAD = ("kernel", "target", "registers", "spilled", "shared KiB", "tensor", "a score", "most frequent instructions")
WIDTHS = (-66, -7, 9, 7, 10, 6, 7, -60)


class Row(NamedTuple):
    """A line; a turn of the loop is `each` half-steps, and in it an inner loop turns `trips` times."""

    name: str
    launch: Launch
    scores: int
    work: str = "exp2"
    trips: int = 1
    each: int = 1
    own: bool = True


def table(targets: list[str]) -> dict[tuple[str, str], Compiled]:
    """Prints it; by name and target."""
    print_rows([HEAD], WIDTHS)
    found: dict[tuple[str, str], Compiled] = {}
    for target in targets:
        chip = CHIPS[target]
        for row in rows(chip):
            if chip.backend == "hip" and not row.own:
                continue
            try:
                x = compiled(row.launch, chip, row.scores, row.work, row.trips)
            except Exception as error:  # a compiler's own: a line of the table, not the end of it
                print_rows([(row.name, target, "", "", "", "", "", f"{type(error).__name__}"[:60])], WIDTHS)
                continue
            found[row.name, target] = x
            score = f"{x.per_score / row.each:.2f}" if x.loop else "?"
            often = " ".join(f"{name} {n / row.each:.2g}" for name, n in x.opcodes(5).items())
            cells = (str(x.registers), str(x.spilled), f"{x.shared / 1024:.0f}", "yes" if x.tensor else "no", score)
            print_rows([(row.name, target, *cells, often)], WIDTHS)
        for name in ("our backward, streaming", "softmax backward"):
            parts = [x.per_score for (of, on), x in found.items() if on == target and of.startswith(name) and x.loop]
            if parts:
                print(f"{target}: {name} in all {sum(parts):.1f} a score")
    if not gpu_peers.installed():
        print("FlashSinkhorn is not installed: pip install flash-sinkhorn")
    return found


def rows(chip: Chip) -> Iterator[Row]:
    yield from ours(chip)
    yield from _softmax(chip)
    if gpu_peers.installed():
        for launch, scores, trips in gpu_peers.launches(POINTS, WIDTH):
            shape = f"{launch.meta['BLOCK_M']} x {launch.meta['BLOCK_N']}, {launch.meta['num_warps']} warps"
            yield Row(f"FlashSinkhorn half-step, {shape}", launch, scores, "exp2", trips, own=False)


def ours(chip: Chip) -> Iterator[Row]:
    """The kernels of a plain problem, in bfloat16, each once: a short problem for the resident ones, and a long one."""
    for case in (Case("resident", length=128, width=WIDTH), Case("streaming", length=POINTS, width=WIDTH)):
        for verb in ("forward", "backward"):
            made = launches(replace(case, verbs=(verb,)), chip)
            if verb == "backward":  # without the forward that it starts with
                made = [x for x in made if "backward" in x.kernel.__name__ or "adjoint" in x.kernel.__name__]
            for launch in distinct(made):
                tile, variant = tile_of(launch), variant_of(launch)
                if tile is None or variant is None:
                    continue
                vector = "vector" if case.name == "resident" else "exp2"
                half = 2 if launch.kernel.__name__ == "forward_kernel" else 1
                name = f"our {verb}, {case.name}: {variant}, {tile[0]} x {tile[1]}"
                yield Row(name, launch, tile[0] * tile[1], vector, each=half)


def variant_of(launch: Launch) -> str | None:
    """What a kernel does, in words; None for one of what is rare."""
    words = [launch.kernel.__name__]
    for x in launch.meta.values():
        if isinstance(x, tuple) and isinstance(getattr(x, "column", None), bool) and len(words) == 1:
            words.append("columns" if x.column else "rows")
        if isinstance(x, tuple) and hasattr(x, "flagged"):
            if x.flagged and not x.scaled:
                return None
            words += [name for name in ("image", "values", "field", "deferred") if getattr(x, name)]
    return " ".join(words)


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
