"""Seconds and memory of many pairs aligned by examples/pfam on one thread, beside another checkout's in the same run.

    python benchmarks/aligner_pairs.py [--lengths 100 170 400 1000] [--repeat 3] [--memory 3000] [--before FOLDER]

Random proteins of one length, a third of whose residues are identical in every two: pairs of sequences of their own,
one by one and in batches of 32, and all against all of a few sequences. Processor time a pair, the least of some
rounds, in which the checkouts take turns, so that whatever else the machine does slows both. Memory is how much a
process grows over a single pair, and its time. FOLDER is another checkout with its compiled engine, for example of
`git worktree add FOLDER COMMIT`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from lib.measure import print_rows

HERE = Path(__file__).parents[1]
LETTERS = np.array(list("ACDEFGHIKLMNPQRSTVWY"))
SHARED = 1 / 3
KINDS = ("one by one", "batches of 32", "all against all")
_CELLS = 2_000_000
"""Pairs of residues that a measurement is of, about."""


def proteins(count: int, length: int, shared: float, seed: int) -> list[str]:
    """Sequences that each keep a residue of the same random one with probability ``shared``."""
    rng = np.random.default_rng([seed, length])
    root = rng.integers(0, 20, length)
    rows = [np.where(rng.random(length) < shared, root, rng.integers(0, 20, length)) for _ in range(count)]
    return ["".join(LETTERS[row]) for row in rows]


def pairs(kind: str, length: int) -> list[tuple[str, str]]:
    """What is aligned."""
    count = min(max(_CELLS // length**2, 2), 64)
    if kind == "all against all":
        some = proteins(round((2 * count) ** 0.5) + 1, length, SHARED**0.5, 0)
        return list(itertools.combinations(some, 2))
    count = max(count // 4, 1) if kind == "one by one" else count
    return [(a, b) for k in range(count) for a, b in [proteins(2, length, SHARED**0.5, k)]]


def serve() -> None:
    """Answers lines of standard input, in the checkout that is the current folder."""
    sys.path.insert(0, os.getcwd())
    import torch

    torch.set_num_threads(1)
    from examples.pfam.library import Asked, solve
    from examples.pfam.release import load_aligner

    aligner = load_aligner()
    for line in sys.stdin:
        what, length = line.rsplit(maxsplit=1)
        kind = KINDS[1] if what == "memory" else what
        given = pairs(kind, int(length))[: 1 if what == "memory" else None]
        asked = [Asked(k, ("a", "b"), pair) for k, pair in enumerate(given)]
        size = 1 if kind == KINDS[0] else 32
        if what == "memory":  # what is loaded and compiled at first is not counted
            list(solve(aligner, [Asked(0, ("a", "b"), (given[0][0][:200], given[0][1][:200]))]))
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        list(solve(aligner, asked, batch_size=size))
        taken = (time.process_time() - start) / len(asked)
        print(taken, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, flush=True)


class Checkout:
    """A process that aligns with a checkout's code."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, what: str, length: int) -> tuple[float, float]:
        """Processor seconds a pair, and kilobytes that the process grew by."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(what, length, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().split()
        if not answer:
            raise SystemExit(f"the process of {self.process.args} ended")
        return float(answer[0]), float(answer[1])

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[100, 170, 400, 1000])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--memory", type=int, nargs="*", default=[3000])
    parser.add_argument("--before", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve()
    folders = {**({"before": options.before.resolve()} if options.before else {}), "now": HERE}
    checkouts = {name: Checkout(folder) for name, folder in folders.items()}
    widths = (8, -16, *(10 for _ in folders), 7)
    print_rows([["residues", "seconds a pair", *folders, "faster"]], widths)
    for length, kind in itertools.product(options.lengths, KINDS):
        best = dict.fromkeys(folders, float("inf"))
        for _ in range(options.repeat + 1):  # the first warms up
            for name, checkout in checkouts.items():
                best[name] = min(best[name], checkout.ask(kind, length)[0])
        ratio = f"{best['before'] / best['now']:.2f}" if options.before else ""
        print_rows([[str(length), kind, *(f"{seconds:.4f}" for seconds in best.values()), ratio]], widths)
    for checkout in checkouts.values():
        checkout.end()
    for length in options.memory:
        for name, folder in folders.items():
            alone = Checkout(folder)
            seconds, grown = alone.ask("memory", length)
            alone.end()
            memory = f"{grown / 1024**2:.2f} GiB, {1024 * grown / length**2:.0f} bytes a pair of residues"
            print(f"{name}: {length} x {length} in {seconds:.1f} s, {memory}")


if __name__ == "__main__":
    main()
