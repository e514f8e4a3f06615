"""What the resident kernels take of a TPU's VMEM, by its compiler: the table of `engines/tpu/resident/spills.py`.

    python benchmarks/vmem.py [--generation v6e v5p] [--width 3 8 32] [--python OTHER]

For strips of several widths (column blocks of 128), the most that the compiler spills in any of: bfloat16 and
float32, plain and with everything at once (dustbin, dropout, relaxation, over-relaxation, a tolerance). `shipped` is
what programs reckon with. The exit status is 1 if that is less than what was found, or a kernel takes more than the
estimate in all. A kernel takes a minute; answers are kept in the user's cache, so that a run can be stopped and goes
on.

`--python` is an interpreter with another jax and libtpu, which need not have torch.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from lib.measure import print_rows

from torch_sinkhorn_attn.aot import child
from torch_sinkhorn_attn.aot.chips import CHIPS
from torch_sinkhorn_attn.engines.tpu.resident.spills import MARGIN, spilled
from torch_sinkhorn_attn.engines.tpu.resident.strip import BLOCK, DEEPER, UNROLLED

DEEPEST = {False: DEEPER * UNROLLED, True: UNROLLED}  # blocks of 128 x 128 in one loop body, by `adjoint`
EVERYTHING = {"rho_row": 0.5, "rho_col": 0.5, "over_relaxation": 1.5, "tolerance": 1e-3, "dropout_p": 0.1}
MIB = 2**20


def point(generation: str, adjoint: bool, width: int, dtype: str, everything: bool) -> dict[str, Any]:
    """The deepest loops over a strip of that width, twice around, four heads."""
    length, keys = 2 * BLOCK * max(1, DEEPEST[adjoint] // width), BLOCK * width
    configuration = {
        "length": length, "keys": keys, "heads": 4, "window": [length + keys] * 2, "dtype": dtype,
        "dustbin": everything,
    }  # fmt: skip
    return {
        "configuration": configuration, "generation": generation, "adjoint": adjoint,
        "statics": EVERYTHING if everything else {},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generation", nargs="+", choices=CHIPS, default=["v6e", "v5p"])
    parser.add_argument("--width", nargs="+", type=int, default=[3, 8, 32], help="column blocks (default: 3 8 32)")
    parser.add_argument("--python", default=sys.executable, help="one with jax and libtpu (default: this one)")
    parser.add_argument("--threads", type=int, help="taken for the sake of `make bench`; a compiler chooses for itself")
    options = parser.parse_args()
    rows, fine = [["kernel", "width", "MiB spilled", "times the margin", "shipped", "in all", "estimate"]], True
    for adjoint in (False, True):
        for width in options.width:
            points = [
                point(generation, adjoint, width, dtype, everything)
                for generation in options.generation
                for dtype in ("bfloat16", "float32")
                for everything in (False, True)
            ]
            arguments = [{"points": [x]} for x in points]  # one process each: a stopped run keeps its answers
            found = [
                child.call("torch_sinkhorn_attn.aot.vmem:measure", x, python=options.python)["answers"][0]
                for x in arguments
            ]
            most = max(x["spills"] for x in found)
            tightest = max(found, key=lambda x: x["vmem"] / x["estimate"])
            shipped = spilled(width, adjoint)
            fine = fine and shipped >= most and tightest["vmem"] <= tightest["estimate"]
            sizes = (most, most * MARGIN, shipped, tightest["vmem"], tightest["estimate"])
            rows.append(["backward" if adjoint else "forward", str(width), *(f"{x / MIB:.2f}" for x in sizes)])
            print(f"{rows[-1][0]}, {width} column blocks: {most / MIB:.2f} MiB spilled", file=sys.stderr, flush=True)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print_rows(rows, [-widths[0], *widths[1:]])
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
