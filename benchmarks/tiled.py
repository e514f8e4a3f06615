"""Time, memory and error of the tiled engine beside the dense definition and softmax attention, in one run.

    python benchmarks/tiled.py [--threads 2] [--repeat 3] [--largest 16384]

Forward + backward in float32. Times are the best of `--repeat`, in turn; memory is the peak of what the step itself
allocated (counted by the dispatcher, so exact and repeatable); the error is relative, of the output and of the query's
gradient, against the definition in float64 where that fits.
"""

from __future__ import annotations

import argparse
import sys
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from lib.measure import best_times, leaves, print_rows, relative, step

from torch_sinkhorn_attn import sinkhorn_attention
from torch_sinkhorn_attn.engines.tiled.engine import ENGINE as tiled
from torch_sinkhorn_attn.problem.arguments import prepare
from torch_sinkhorn_attn.problem.problem import OutputGrads

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from memory import PeakMemory

Case = tuple[str, tuple[int, ...], dict]
DENSE_LIMIT = 2048  # tokens up to which the dense definition is run


def cases(largest: int) -> list[Case]:
    found: list[Case] = [("full", (8, 4, 128, 32), {}), ("full", (1, 4, 1024, 64), {}), ("full", (1, 1, 2048, 64), {})]
    for n in (2048, 4096, 8192, 16384, 32768):
        if n <= largest:
            found.append(("band 128", (1, 1, n, 64), {"window": (128, 128)}))
    return found


def peak_bytes(shape: tuple[int, ...], options: dict) -> int:
    prepared = prepare(*(x.detach() for x in leaves(shape)), **options)
    with PeakMemory() as memory:
        result = tiled.forward(prepared.inputs, prepared.problem)
        tiled.backward(prepared.inputs, prepared.problem, result.output, result.potentials, OutputGrads(result.output))
    return memory.peak


def row(case: Case, repeat: int) -> list[str]:
    name, shape, options = case
    inputs = leaves(shape)
    runs = {"tiled": lambda: step(inputs, lambda *x: sinkhorn_attention(*x, engine="tiled", **options))}
    runs["softmax"] = lambda: step(inputs, F.scaled_dot_product_attention)
    dense = shape[-2] <= DENSE_LIMIT
    if dense:
        runs["dense"] = lambda: step(inputs, lambda *x: sinkhorn_attention(*x, engine="reference", **options))
    seconds = best_times(runs, repeat)
    errors = ["", ""]
    if dense:
        truth = step(leaves(shape, torch.float64), lambda *x: sinkhorn_attention(*x, engine="reference", **options))
        errors = [f"{relative(x, y):.1e}" for x, y in zip(runs["tiled"](), truth, strict=True)]
    tokens = shape[0] * shape[1] * shape[2]
    return [
        name, "x".join(map(str, shape)), f"{1e3 * seconds['tiled']:.0f}", f"{1e6 * seconds['tiled'] / tokens:.1f}",
        f"{seconds['dense'] / seconds['tiled']:.1f}x" if dense else "", f"{seconds['tiled'] / seconds['softmax']:.1f}x",
        f"{peak_bytes(shape, options) / 2**20:.1f}", *errors,
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--largest", type=int, default=16384, help="longest band")
    arguments, _ = parser.parse_known_args()
    torch.set_num_threads(arguments.threads)
    head = ["support", "N x H x L x E", "ms", "us/token", "dense is", "softmax x", "peak MiB", "error", "error dQ"]
    print(f"torch {torch.__version__}, {arguments.threads} threads, T = 20, R = 2, forward + backward")
    widths = [max(9, len(x)) for x in head]
    widths[1] = 14
    print_rows(chain([head], (row(case, arguments.repeat) for case in cases(arguments.largest))), widths)


if __name__ == "__main__":
    main()
