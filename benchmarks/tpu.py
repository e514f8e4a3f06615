"""What the TPU compiler makes of the kernels, on a machine without a TPU: cycles and memory, no times.

    python benchmarks/tpu.py [--only cycles lengths memory generations] [--python OTHER] [--lengths 8192 131072 ...]

cycles: one head of 8192 tokens in bfloat16, window (128, 128), T = 20, R = 2, on v6e: bundles (a bundle is a cycle of
the core) that the forward and the backward kernel issue, for each 8 x 128 vector of scores in the tiles visited, beside
JAX's flash attention (512 x 512 tiles) compiled in the same run. "filled" leaves out the bundles that hold no
instruction and wait for a latency. A half-step is a sweep's share: the difference of T = 40 and T = 20.
lengths: over the length (`--lengths`), the window (`--windows`, of so many tokens on each side), the features
(`--features`) and the generation (`--generations`), which kernels are chosen and the bundles that the program issues
for each 8 x 128 scores of the support, forward and backward, beside softmax attention: splash attention over the same
band and flash attention over all pairs. A compilation takes some minutes, so the defaults are few.
memory: HBM of forward and backward over the length, window (128, 128).
generations: forward and backward compiled for every generation, by the resident and by the streaming kernels.

`--python` is an interpreter with another jax and libtpu, which need not have torch; give it twice to compare.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

from lib.measure import print_rows

from torch_sinkhorn_attn.aot import child
from torch_sinkhorn_attn.aot.chips import CHIPS
from torch_sinkhorn_attn.aot.loops import Loop, weighted
from torch_sinkhorn_attn.engines.tpu.resident.strip import BLOCK, Strip

WINDOW, LENGTH = (128, 128), 8192
LENGTHS = (8192, 32768, 131072)
MOST_SPLASH = 16384
VECTOR = 8 * 128
OPTIONS = argparse.Namespace()
STRIP = Strip(LENGTH // BLOCK, LENGTH // BLOCK, 3)
VECTORS = LENGTH * STRIP.columns / (8 * 128)  # of scores in the tiles visited


def compiled(python: str | None, chip: Any, shape: str, base_dtype: str = "float32", **configuration: Any) -> Any:
    configuration = {"length": LENGTH, "window": WINDOW} | configuration
    arguments = {
        "configuration": configuration, "topology": chip.topology, "generation": chip.name, "shape": shape,
        "base_dtype": base_dtype,
    }  # fmt: skip
    return child.call("torch_sinkhorn_attn.aot.attention:compile_attention", arguments, python=python)


def kernel_cycles(report: Any, name: str) -> tuple[float, float]:
    """Bundles of a resident kernel per vector, and the filled ones."""
    kernel = next(k for k in report["kernels"] if name in k["name"])
    loops = [Loop(**loop) for loop in kernel["loops"]]
    once = kernel["bundles"] - sum(loop.last - loop.first + 1 for loop in loops if loop.depth == 1)
    return tuple((weighted(loops, filled=f) + once) / VECTORS for f in (False, True))  # type: ignore[return-value]


def cycles(python: str | None) -> None:
    chip = CHIPS["v6e"]
    rows = [["kernels", "forward", "backward", "both", "both, filled", "half-step"]]
    flash: dict[str, float] = {}
    for base_dtype in ("float32", "bfloat16"):
        found = []
        for base_iters in (20, 40):
            report = compiled(python, chip, "resident", base_dtype, base_iters=base_iters)
            flash, versions = report["flash"], report["versions"]
            found.append([kernel_cycles(report, f"resident_{x}") for x in ("forward", "backward")])
        (forward, backward), (longer, _) = found
        both = [forward[i] + backward[i] for i in (0, 1)]
        half_step = (longer[0] - forward[0]) / 40
        rows.append([f"resident, base {base_dtype}", *_numbers(forward[0], backward[0], *both), f"{half_step:.2f}"])
    both = [flash["forward"] + flash["backward"], flash["forward_filled"] + flash["backward_filled"]]
    rows.append(["JAX flash attention", *_numbers(flash["forward"], flash["backward"], *both), ""])
    print(f"\nv6e, bundles per 8 x 128 scores ({versions})")
    table(rows)


def lengths(python: str | None) -> None:
    columns = "generation,window,features,length,kernels,bundles,splash over the band,flash over all pairs,HBM MiB"
    rows = [columns.split(",")]
    o = OPTIONS
    for name, window, features, length in itertools.product(o.generations, o.windows, o.features, o.lengths):
        row = [name, str(window), str(features), str(length)]
        try:
            report = compiled(python, CHIPS[name], "auto", length=length, window=(window, window), features=features)
        except child.CompileError as error:
            rows.append([*row, str(error), "", "", "", ""])
            continue
        support = length * (2 * window + 1) - window * (window + 1)
        flash = report["flash"]["forward"] + report["flash"]["backward"]
        rows.append(
            [
                *row,
                report["shape"],
                f"{issued(report) / (support / VECTOR):.1f}",
                splash(python, CHIPS[name].topology, length, window, features),
                f"{flash * length**2 / support:.0f}",
                f"{report['memory']['temporaries'] / 2**20:.0f}",
            ]
        )
    print(f"\nbundles per 8 x 128 scores of the support ({report['versions']})")
    table(rows)


def splash(python: str | None, topology: str, length: int, window: int, features: int) -> str:
    """Bundles of splash attention; its mask's blocks are counted by the host, which takes long beyond `MOST_SPLASH`
    tokens, and cost the same there."""
    given = {"topology": topology, "length": min(length, MOST_SPLASH), "window": (window, window), "features": features}
    try:
        found = child.call("torch_sinkhorn_attn.aot.flash:measure_band", given, python=python)
    except child.CompileError as error:
        return str(error)
    return f"{found['forward'] + found['backward']:.0f}"


def issued(report: Any) -> float:
    """Bundles of all kernels that the program runs; not of those that only unfit data need."""
    total = 0.0
    for kernel in report["kernels"]:
        if not kernel["executions"]:
            continue
        loops = [Loop(**loop) for loop in kernel["loops"]]
        own = kernel["bundles"] - sum(loop.last - loop.first + 1 for loop in loops if loop.depth == 1)
        once = {i: 1.0 - 1.0 / loop.trips for i, loop in enumerate(loops) if loop.grid and loop.trips}
        total += kernel["executions"] * (weighted(loops, skipped=once) + own)
    return total


def table(rows: list[list[str]]) -> None:
    print_rows(rows, [max(map(len, column)) * (-1 if i == 0 else 1) for i, column in enumerate(zip(*rows))])


def _numbers(*values: float) -> list[str]:
    return [f"{value:.1f}" for value in values]


def memory(python: str | None) -> None:
    rows = [["length", "shape", "arguments MiB", "outputs MiB", "temporaries MiB", "bytes a token"]]
    for length in LENGTHS:
        report = compiled(python, CHIPS["v6e"], "auto", length=length)
        parts = [report["memory"][name] for name in ("arguments", "outputs", "temporaries")]
        rows.append([str(length), report["shape"], *_numbers(*(x / 2**20 for x in parts)), f"{parts[2] / length:.0f}"])
    print(f"\nv6e, HBM of forward and backward, one head ({report['versions']})")
    table(rows)


def generations(python: str | None) -> None:
    rows = [["generation", "resident", "streaming"]]
    for chip in CHIPS.values():
        row = [chip.name]
        for shape in ("resident", "streaming"):
            try:
                report = compiled(python, chip, shape, length=1024)
                row.append(f"compiles, temporaries {report['memory']['temporaries'] / 2**20:.1f} MiB")
            except child.CompileError as error:
                row.append(str(error))
        rows.append(row)
    print("\nforward and backward of 1024 tokens, window (128, 128)")
    table(rows)


SECTIONS = {"cycles": cycles, "lengths": lengths, "memory": memory, "generations": generations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--python", action="append", help="an interpreter with jax and libtpu (default: this one)")
    parser.add_argument("--threads", type=int, help="taken for the sake of `make bench`; a compiler chooses for itself")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 131072], help="of section lengths")
    parser.add_argument("--windows", type=int, nargs="+", default=[128])
    parser.add_argument("--features", type=int, nargs="+", default=[64])
    parser.add_argument("--generations", nargs="+", choices=CHIPS, default=["v6e"])
    options = parser.parse_args(namespace=OPTIONS)
    for python in options.python or [sys.executable]:
        for section in options.only:
            SECTIONS[section](python)


if __name__ == "__main__":
    main()
