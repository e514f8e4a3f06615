"""Time, memory and error of the CPU engine beside dense autograd, softmax attention and other people's Sinkhorn.

    python benchmarks/cpu.py [--quick] [--only full] [--repeat 3] [--threads 2] [--largest 16384] [--out benchmarks/out]

Each case is one table in which the functions take turns. "ms" is the best of `--repeat` rounds after one to warm up;
"x cpu" is that over the CPU engine's, of the same thing (forward + backward, or forward alone); "peak MiB" is what the
resident set of a fresh process grew by in one call, its result and gradients included; "error" and "error dQ" are
relative to float64, in the first head: of the output, and of the query's gradient, each function's against the gradient
that it takes (tail, unrolled, implicit). Functions without a window of their own get a dense mask of the band; a
function is left out where it is expected to take more than 10 s or 6 GB, or has no backward.

Rivals are optional: pip install -r benchmarks/requirements.txt. Writes the tables as CSV and a plot into `--out`.
"""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from lib.cases import Case
from lib.functions import SUBJECT, ours
from lib.half_steps import half_steps
from lib.plot import plot
from lib.rivals import rivals
from lib.tables import Cell, Tables, quiet, write_csv
from lib.targets import targets

BAND = (128, 128)
SECTIONS = ("full", "band", "heads", "iterations", "dtype", "half-steps", "targets")
DTYPES = ("float32", "float64", "bfloat16")


@dataclass(frozen=True)
class Sizes:
    """Lengths of the sweeps."""

    full: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    band: tuple[int, ...] = (2048, 4096, 8192, 16384)
    several: tuple[int, ...] = (4096, 16384)  # the band with four heads
    middle: int = 1024  # of the sweeps over anything but the length
    short: int = 128
    target: int = 2048  # of the targets and half-steps, full support

    def at_most(self, largest: int) -> Sizes:
        def kept(lengths: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(n for n in lengths if n <= largest) or (min(largest, lengths[0]),)

        return Sizes(
            kept(self.full), kept(self.band), kept(self.several), min(self.middle, largest),
            min(self.short, largest), min(self.target, largest),
        )  # fmt: skip


QUICK = Sizes((128, 256), (512, 1024), (), middle=128, short=32, target=256)


def sweeps(sizes: Sizes) -> dict[str, list[Case]]:
    n = sizes.middle
    return {
        "full": [Case(1, 4, length) for length in sizes.full],
        "band": [Case(1, 1, length, window=BAND) for length in sizes.band]
        + [Case(1, 4, length, window=BAND) for length in sizes.several],
        "heads": [Case(1, 1, n), Case(1, 4, n), Case(32, 4, sizes.short)],
        "iterations": [Case(1, 4, n, base_iters=t) for t in (5, 20, 50)],
        "dtype": [Case(1, 4, n, dtype=dtype) for dtype in DTYPES],
    }


def legend(tables: Tables, missing: list[str]) -> None:
    for function in tables.functions:
        print(textwrap.fill(f"  {function.name:13} {function.gives}", 120, subsequent_indent=" " * 16))
    for line in missing:
        print(f"  {line}")
    if SUBJECT != "cpu":
        print(f'  There is no engine "cpu" in this build: ratios are to "{SUBJECT}".')


def draw(tables: Tables, done: dict[str, list[Case]], path: Path) -> None:
    columns: dict[str, list[Cell]] = {}
    for section, heads in (("full", 4), ("band", 1)):
        cells = [x for case in done.get(section, []) if case.heads == heads for x in tables.known.get(case, [])]
        if cells:
            support = "full support" if section == "full" else "window (128, 128)"
            columns[f"{support}, {heads} head{'s' * (heads > 1)} of 64, T = 20, R = 2"] = cells
    if columns:
        plot(path, columns)
        print(f"\nplot: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: a trial, not a measurement")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="a section; may be given several times")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--largest", type=int, default=16384, help="longest sequence of any sweep")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    arguments, _ = parser.parse_known_args()
    torch.set_num_threads(arguments.threads)
    quiet()
    wanted = arguments.only or SECTIONS
    repeat = 1 if arguments.quick else arguments.repeat
    sizes = QUICK if arguments.quick else Sizes().at_most(arguments.largest)
    others, missing = rivals(arguments.threads)
    tables = Tables([*ours(), *others], repeat, arguments.threads, arguments.quick)
    print(f"torch {torch.__version__}, {arguments.threads} threads; the functions:")
    legend(tables, missing)
    done: dict[str, list[Case]] = {}
    long = max(sizes.band)
    for section, cases in sweeps(sizes).items():
        if section in wanted:
            print(f"\n== {section}")
            for case in cases:
                tables.show(case, always=["dense"] if case == Case(1, 4, sizes.target) else [])
            done[section] = cases
    if "half-steps" in wanted:
        print("\n== half-steps")
        half_cases = [Case(1, 4, sizes.target), Case(1, 1, long, window=BAND)]
        write_csv(arguments.out / "half_steps.csv", half_steps(half_cases))
    if "targets" in wanted:
        print("\n== targets")
        write_csv(arguments.out / "targets.csv", targets(tables, sizes.target, min(sizes.band), long, BAND))
    write_csv(arguments.out / "table.csv", [x.record() for cells in tables.known.values() for x in cells])
    draw(tables, done, arguments.out / "length.png")


if __name__ == "__main__":
    main()
