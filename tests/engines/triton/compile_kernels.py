"""`python compile_kernels.py TARGET CASE [KERNEL ...]`: compiles what the engine would launch for a case of
`benchmarks/lib/gpu_warm.py`, each kernel once or (ending in "*") every variant, and prints what came of it as JSON.

A process of its own, since triton decides when it is imported whether it compiles or interprets.
"""

from __future__ import annotations

import json
import sys

from benchmarks.lib.gpu_launches import distinct, launches
from benchmarks.lib.gpu_static import compiled
from benchmarks.lib.gpu_table import tile_of, variant_of
from benchmarks.lib.gpu_warm import cases
from torch_sinkhorn_attn.engines.triton.launch import CHIPS


def main(target: str, name: str, *kernels: str) -> None:
    case = next(x for x in cases() if x.name == name)
    chip, seen, found = CHIPS[target], set(), []
    for launch in distinct(launches(case, chip)):
        kernel = launch.kernel.__name__
        if kernels and f"{kernel}*" not in kernels and (kernel not in kernels or kernel in seen):
            continue
        seen.add(kernel)
        rows, cols = tile_of(launch) or (1, 1)
        resident = kernel in ("forward_kernel", "backward_kernel")
        x = compiled(launch, chip, rows * cols, "vector" if resident else "exp2")
        spills = sum(i.startswith(("LDL", "STL", "scratch_")) for i in x.loop)
        found.append({
            "kernel": kernel, "variant": variant_of(launch), "registers": x.registers, "spilled": x.spilled,
            "spills in loop": spills, "shared": x.shared, "most shared": chip.shared, "tensor": x.tensor,
            "per score": x.per_score if x.loop else None, "products": x.products,
        })  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
