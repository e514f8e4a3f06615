"""What a busy neighbour costs: a training step of the CPU engine and of softmax attention, alone and beside processes
that keep cores busy, as data-loading workers do.

    python benchmarks/contention.py [--threads 2] [--busy 0 1 2] [--rounds 10] [--tokens 256 1024 2048]

"ms" is the median of `--rounds` forward and backward passes in which the functions take turns; "slowdown" is that over
the function's own median alone; "x softmax's" is the engine's slowdown over that of softmax attention: it should stay
below 1.3.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch
from lib.cases import Case
from lib.functions import SUBJECT, ours
from lib.measure import print_rows

FUNCTIONS = (SUBJECT, "softmax")
HEAD = ("tokens", "busy", "function", "ms", "slowdown", "x softmax's")
WIDTHS = (6, 4, -8, 9, 8, 11)


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Beside so many processes that never rest."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        time.sleep(0.3 if running else 0)
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def medians(case: Case, rounds: int) -> dict[str, float]:
    """Seconds of a training step of each function."""
    runs = {f.name: f.prepare(case, True) for f in ours() if f.name in FUNCTIONS}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    return {name: median(times[1:]) for name, times in taken.items()}  # the first warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2], help="busy processes; 0 comes first")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 2048])
    arguments, _ = parser.parse_known_args()
    torch.set_num_threads(arguments.threads)
    print(f"1 x 4 heads of 64, T = 20, R = 2, float32, {arguments.threads} threads")
    print_rows([HEAD], WIDTHS)
    for tokens in arguments.tokens:
        alone: dict[str, float] = {}
        for processes in sorted({0, *arguments.busy}):
            with busy(processes):
                found = medians(Case(1, 4, tokens), arguments.rounds)
            alone = alone or found
            slowdown = {name: seconds / alone[name] for name, seconds in found.items()}
            print_rows(
                (
                    (
                        str(tokens), str(processes), name, f"{found[name] * 1e3:.1f}", f"{slowdown[name]:.2f}",
                        "" if name == "softmax" else f"{slowdown[name] / slowdown['softmax']:.2f}",
                    )
                    for name in FUNCTIONS
                ),
                WIDTHS,
            )  # fmt: skip


if __name__ == "__main__":
    main()
