"""Seconds and memory of many pairs aligned by examples/pfam on one thread, beside another checkout's in the same run.

    python benchmarks/aligner_pairs.py [--lengths 100 170 400 1000] [--repeat 3] [--memory 100 1000 2000 3000]
        [--before FOLDER]

Random proteins of one length, a third of whose residues are identical in every two: pairs of sequences of their own,
one by one and in batches of 32, and all against all of a few sequences. Processor time a pair, the least of some
rounds, in which the checkouts take turns, so that whatever else the machine does slows both. Memory is the peak of the
whole process of `python -m examples.pfam align` of one pair, with its files and picture, and its processor time, start
and all; `--lengths` without a number leaves the rest out. FOLDER is another checkout with its compiled engine, for
example of `git worktree add FOLDER COMMIT`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
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
        kind, length = line.rsplit(maxsplit=1)
        asked = [Asked(k, ("a", "b"), pair) for k, pair in enumerate(pairs(kind, int(length)))]
        start = time.process_time()
        list(solve(aligner, asked, batch_size=1 if kind == KINDS[0] else 32))
        print((time.process_time() - start) / len(asked), flush=True)


def surroundings(folder: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}


def command(folder: Path, length: int) -> tuple[float, float]:
    """Processor seconds and peak MiB of the process of `align`."""
    with tempfile.TemporaryDirectory() as out:
        files = [Path(out) / f"{name}.fasta" for name in "ab"]
        for file, letters in zip(files, proteins(2, length, SHARED**0.5, 0), strict=True):
            file.write_text(f">{file.stem}\n{letters}\n")
        arguments = ["align", *map(str, files), "--out", f"{out}/found", "--threads", "1"]
        process = subprocess.Popen(
            [sys.executable, "-m", "examples.pfam", *arguments],
            cwd=folder, env=surroundings(folder), stdout=subprocess.DEVNULL,
        )  # fmt: skip
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{process.args} ended with {process.returncode}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


class Checkout:
    """A process that aligns with a checkout's code."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve"],
            cwd=folder, env=surroundings(folder), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, kind: str, length: int) -> float:
        """Processor seconds a pair."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(kind, length, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process of {self.process.args} ended")
        return float(answer)

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[100, 170, 400, 1000])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--memory", type=int, nargs="*", default=[100, 1000, 2000, 3000])
    parser.add_argument("--before", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve()
    folders = {**({"before": options.before.resolve()} if options.before else {}), "now": HERE}
    checkouts = {name: Checkout(folder) for name, folder in folders.items() if options.lengths}
    widths = (8, -16, *(10 for _ in folders), 7)
    if options.lengths:
        print_rows([["residues", "seconds a pair", *folders, "faster"]], widths)
    for length, kind in itertools.product(options.lengths, KINDS):
        best = dict.fromkeys(folders, float("inf"))
        for _ in range(options.repeat + 1):  # the first warms up
            for name, checkout in checkouts.items():
                best[name] = min(best[name], checkout.ask(kind, length))
        ratio = f"{best['before'] / best['now']:.2f}" if options.before else ""
        print_rows([[str(length), kind, *(f"{seconds:.4f}" for seconds in best.values()), ratio]], widths)
    for checkout in checkouts.values():
        checkout.end()
    for length, (name, folder) in itertools.product(options.memory, folders.items()):
        seconds, peak = command(folder, length)
        print(
            f"align, {name}: {length} x {length} residues, {seconds:.1f} s, at most {peak / 1024:.2f} GiB", flush=True
        )


if __name__ == "__main__":
    main()
