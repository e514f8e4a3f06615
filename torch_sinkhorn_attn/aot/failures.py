"""What the compiler says when it cannot, in a line for people."""

from __future__ import annotations

import re

_SCOPED = re.compile(
    r"memory space vmem while allocating on stack for %?(\S+).*?"
    r"Scoped allocation with size ([\d.]+\w) and limit ([\d.]+\w)",
    re.DOTALL,
)
_ALLOCATION = re.compile(
    r"Allocation \(size=(\d+)\) would exceed memory \(size=(\d+)\).*?space=(vmem|smem).*?:: ([\w.]+)", re.DOTALL
)
_CAPACITY = re.compile(r"memory space (vmem|hbm|smem)\. Used ([\d.]+\w?) of ([\d.]+\w?)")
_HBM = re.compile(r"Ran out of memory on HBM.*?\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", re.DOTALL)
_MOSAIC = re.compile(r"Mosaic failed to compile TPU kernel[^:]*: (.*)")
_NAMES = {"vmem": "VMEM", "hbm": "HBM", "smem": "scalar memory"}


def explain(text: str) -> str:
    """The reason in an error of JAX, XLA, Mosaic or libtpu.

    >>> explain("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 83.8G of 31.2G hbm. Exceeded ...")
    'HBM overflow: the program needs 83.8G, the chip offers 31.2G'
    >>> allocation = "Allocation (size=201326592) would exceed memory (size=134217728) :: #allocation3 [shape = 'f32"
    >>> explain(allocation + "[131072,384]{1,0:T(8,128)}', space=vmem, size = 0xc000000, scoped] :: some_kernel.1")
    'VMEM overflow: kernel some_kernel.1 needs 192.0M for one array, the chip offers 128.0M'
    """
    if found := _SCOPED.search(text):
        return f"VMEM overflow: kernel {found[1]} needs {found[2]}, its limit is {found[3]}"
    if found := _ALLOCATION.search(text):
        size, limit = (f"{int(x) / 2**20:.1f}M" for x in found.group(1, 2))
        return f"{_NAMES[found[3]]} overflow: kernel {found[4]} needs {size} for one array, the chip offers {limit}"
    if found := _CAPACITY.search(text):
        return f"{_NAMES[found[1]]} overflow: the program needs {found[2]}, the chip offers {found[3]}"
    if found := _HBM.search(text):
        return f"HBM overflow: the program's temporaries need {found[1]}, the chip offers {found[2]}"
    if found := _MOSAIC.search(text):
        return f"the kernel compiler refuses the kernel: {found[1].strip()}"
    if "Invalid TPU external name" in text:
        return "this libtpu does not know the generation: give a Python with a newer jax and libtpu by --python"
    if "hlo_instruction.cc" in text:  # of a proto that was written by another XLA
        return (
            "this jaxlib cannot read what so new a libtpu compiled: install the pair that belongs "
            "together, pip install 'jax[tpu]'"
        )
    if "lockfile" in text:
        return "another process holds libtpu, and did not start it for several at a time"
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    first = lines[0] if lines else "the compiler gave no reason"
    return re.sub(r"^(INTERNAL|INVALID_ARGUMENT|UNIMPLEMENTED|RESOURCE_EXHAUSTED): ", "", first)
