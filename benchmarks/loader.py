"""The protein aligner's loader over as many families as Pfam-A.seed has: time, memory, padding, in one run.

    python benchmarks/loader.py [--families 200 2000 20000] [--steps 256] [--workers 2] [--folder PATH]

Families are made up: lognormal many rows (median 26, mean 60), lognormal lengths (median 130, mean 160), gaps and
inserts, in a Stockholm file as Pfam writes it; 20,000 are 1.2 million sequences and take some minutes. "index" is the
conversion into a store, once; "open" is every later start. Memory is the process's resident set: after the imports,
after the batches, and the most while indexing; "whole" is the same file read into memory instead. Pairs per second are
of batches of 8 pairs ready for the model, drawn by one process, and by workers; the padding is the share of the plans'
entries, with sorting by length and without.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from lib.measure import print_rows

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples is not installed

from examples.pfam.loader import drawn_ahead
from examples.pfam.pairs import Family, load_families
from examples.pfam.sampler import PairSampler, padding
from examples.pfam.stockholm import read_stockholm
from examples.pfam.streaming import stored_families

T = TypeVar("T")
LETTERS = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", dtype=np.uint8)
HEAD = ("families", "sequences", "text MB", "store MB", "index s", "open s", "pairs/s", "workers", "padding")
HEAD += ("unsorted", "MB before", "after", "indexing", "whole")


@dataclass(frozen=True)
class Loading:
    """What a process saw of a store; memory in MB."""

    seconds: float
    sequences: int
    pairs_per_second: float
    with_workers: float
    padding: float
    unsorted: float
    before: float
    after: float


def write_families(path: Path, count: int) -> None:
    """A Stockholm file of made-up families."""
    rng = np.random.default_rng(0)
    with open(path, "wb") as file:
        for index in range(count):
            rows = int(np.clip(rng.lognormal(np.log(26), 1.3), 2, 3000))
            columns = int(np.clip(1.2 * rng.lognormal(np.log(130), 0.65), 24, 2400))
            chance = rng.integers(0, 256, (2, rows, columns), dtype=np.uint8)
            ancestor, fresh = LETTERS[rng.integers(0, 20, columns)], LETTERS[chance[1] % 20]
            aligned = np.where(chance[0] < 20, ord("-"), np.where(chance[0] < 150, fresh, ancestor))
            inserted = np.where(chance[0] < 200, ord("."), fresh | 32)
            letters = np.where(rng.random(columns) < 0.12, inserted, aligned).astype(np.uint8)
            letters[:, :8] = LETTERS[chance[1][:, :8] % 20]  # no row is all gaps
            names = (f"F{index:05}_{row}/1-{columns}".ljust(28).encode() for row in range(rows))
            file.write(f"# STOCKHOLM 1.0\n#=GF ID   Family_{index}\n#=GF AC   PF{index:05}.1\n".encode())
            file.writelines(name + row.tobytes() + b"\n" for name, row in zip(names, letters, strict=True))
            file.write(b"//\n")


def resident(kind: str = "VmRSS") -> float:
    """MB of this process that are in memory, or were at most (VmHWM); not a number where there is no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [float(line.split()[1]) / 1024 for line in lines if line.startswith(f"{kind}:")]
    return found[0] if found else float("nan")


def index(path: Path, cache: Path) -> tuple[float, float]:
    """Seconds to make a store, MB at most meanwhile."""
    began = time.perf_counter()
    stored_families(path, cache)
    return time.perf_counter() - began, resident("VmHWM")


def load(path: Path, cache: Path, steps: int, workers: int) -> Loading:
    """Open a store and draw batches from it."""
    before, began = resident(), time.perf_counter()
    families = [family for family in stored_families(path, cache) if len(family.sequences) > 1]
    seconds = time.perf_counter() - began
    speed, filled = draw(families, steps, workers=0)
    return Loading(
        seconds=seconds,
        sequences=sum(len(family.sequences) for family in families),
        pairs_per_second=speed,
        padding=filled,
        before=before,
        after=resident(),
        unsorted=draw(families, steps // 4, workers=0, pool=1)[1],
        with_workers=draw(families, steps, workers)[0],
    )


def whole(path: Path) -> float:
    """MB with the same families in memory."""
    families = load_families(read_stockholm(path))
    return resident() if families else float("nan")


def draw(families: list[Family], steps: int, workers: int, pool: int = 32) -> tuple[float, float]:
    """Pairs per second, and the share of padding."""
    sampler = PairSampler(
        families, size=8, cells=1_000_000, cap=400, mutation_rate=0.3, indels=1.0, seed=0, pool=pool
    )  # fmt: skip
    began = time.perf_counter()
    # Forked, as training forks them; in a process that was spawned the default is to spawn, which imports all anew.
    pairs_of_steps = drawn_ahead(sampler.pairs, 0, steps, workers, "fork" if workers else None)
    drawn = [padding(sampler.parts(pairs)) for pairs in pairs_of_steps]
    return steps * 8 / (time.perf_counter() - began), float(np.mean(drawn))


def alone(function: Callable[..., T], *arguments: object) -> T:
    """Its result in a process of its own, whose memory is nobody else's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def row(folder: Path, count: int, steps: int, workers: int) -> list[str]:
    path, cache = folder / f"{count}.sto", folder / "cache"
    write_families(path, count)
    seconds, most = alone(index, path, cache)
    store = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    found = alone(load, path, cache, steps, workers)
    memory = (found.before, found.after, most, alone(whole, path))
    text = path.stat().st_size
    path.unlink()
    for file in cache.rglob("*.*"):
        file.unlink()
    return [
        f"{count}", f"{found.sequences}", f"{text / 1e6:.0f}", f"{store / 1e6:.0f}", f"{seconds:.1f}",
        f"{found.seconds:.2f}", f"{found.pairs_per_second:.0f}", f"{found.with_workers:.0f}", f"{found.padding:.2f}",
        f"{found.unsorted:.2f}", *(f"{megabytes:.0f}" for megabytes in memory),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", type=int, nargs="+", default=[200, 2000])
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", help="for the text and the store (default: a temporary one)")
    arguments, _ = parser.parse_known_args()
    print(f"batches of 8 pairs, cap 400, pools of 32 steps, {arguments.workers} workers")
    widths = [max(len(name), 8) for name in HEAD]
    print_rows([HEAD], widths)
    for count in arguments.families:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            print_rows([row(Path(folder), count, arguments.steps, arguments.workers)], widths)


if __name__ == "__main__":
    main()
