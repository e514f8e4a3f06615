"""The tables of a plan, from the plain values that a child process returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch_sinkhorn_attn.aot.chips import MIB, Topology
from torch_sinkhorn_attn.aot.loops import Loop, weighted

_BUSIEST = 3
_OF_A_MATRIX = 3  # commas in its shape, [N, H, tokens, features]
VECTOR = 8 * 128
"""Scores in a vector register."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A text table; the first column is left-aligned, the others right-aligned."""
    widths = [max(len(row[c]) for row in (header, *rows)) for c in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def capacity(topology: Topology, devices: int) -> float:
    """Bytes of HBM that one of a slice's devices has."""
    return topology.chip.hbm * topology.share(devices)


def memory(found: dict[str, Any], topology: Topology) -> str:
    """What one device's HBM holds, and whether that fits."""
    held, limit = found["memory"], capacity(topology, found["devices"])
    total = held["arguments"] + held["outputs"] - held["aliased"] + held["temporaries"] + held["code"]
    parts = [("arguments", 1), ("outputs", 1), ("aliased", -1), ("temporaries", 1), ("code", 1)]
    names = {"aliased": "outputs that reuse arguments", "code": "the program itself"}
    rows = [(names.get(name, name), sign * held[name]) for name, sign in parts if held[name]]
    body = table(
        ["HBM of one device", "MiB", "share"],
        [[name, f"{size / MIB:,.1f}", f"{size / limit:.1%}"] for name, size in [*rows, ("total", total)]],
    )
    verdict = "fits" if total <= limit else "does not fit: HBM overflow"
    return f"{verdict}: {total / MIB:,.1f} of {limit / MIB:,.0f} MiB\n\n{body}"


def wire(found: dict[str, Any], half_steps: int) -> str:
    """What one device sends in a step of so many half-steps, those of the backward counted."""
    every: dict[tuple[str, str, int | None], list[float]] = {}
    for x in found["wire"]:
        every.setdefault((x["operation"], x["array"], x["times"]), []).append(x["bytes"])
    rows, total, vectors = [], 0.0, 0.0
    for (operation, array, times), each in every.items():
        sent = None if times is None else times * sum(each)
        rows.append([operation, array, _count(times), str(len(each)), f"{sum(each):,.0f}", _count(sent)])
        total += sent or 0
        vectors += (sent or 0) if array.count(",") < _OF_A_MATRIX else 0
    body = table(["sent by one device", "array", "runs", "of them", "bytes a run", "bytes a step"], rows)
    return (
        f"{body}\nin all {total:,.0f} bytes a step; vectors: {vectors / half_steps:,.0f} bytes a half-step of all heads"
    )


def kernels(found: dict[str, Any], topology: Topology) -> str:
    """The Pallas kernels, loop by loop: those that run, and then those that only some data need."""
    every = merged(found["kernels"])
    if not every:
        return "no Pallas kernel: XLA compiles it all"
    note = (
        "runs: of a kernel per step, of a loop per run of what is around it, or 'by data' (varying lengths). VMEM:\n"
        "windows, scratch and spills. bundles: cycles of one trip without the loops inside, both sides of a branch\n"
        "counted; filled: those of them that hold an instruction, the others wait"
    )
    parts = [_kernel_table("kernel", [k for k in every if k["executions"] != 0], "executions", topology), note]
    rare = [k for k in every if k["unfit"] != 0]
    if rare:
        short = [{**k, "loops": []} for k in rare]
        parts += ["", _kernel_table("only if the data do not fit", short, "unfit", topology)]
    return "\n".join(parts)


def _kernel_table(title: str, kernels: Sequence[dict[str, Any]], runs: str, topology: Topology) -> str:
    rows = []
    for kernel in kernels:
        limit = kernel["vmem_limit"] or topology.chip.vmem
        vmem = f"{kernel['vmem'] / MIB:.1f} of {limit / MIB:.0f}"
        rows.append([_shortened(kernel["name"]), _count(kernel[runs]), vmem, str(kernel["bundles"]), "", ""])
        for loop in kernel["loops"]:
            busiest = sorted(loop["slots"].items(), key=lambda item: -item[1])[:_BUSIEST]
            slots = ", ".join(f"{name} {share:.0%}" for name, share in busiest if share >= 0.005)
            name = f"{'  ' * loop['depth']}{'grid' if loop['grid'] else 'loop'} at {loop['first']:#x}"
            rows.append([name, _count(loop["trips"]), "", str(loop["bundles"]), str(loop["filled"]), slots])
    return table([title, "runs", "VMEM MiB", "bundles", "filled", "slots used most"], rows)


def merged(kernels: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Kernels of the same code as one, with their executions added up."""
    found: dict[str, dict[str, Any]] = {}
    for kernel in kernels:
        code = repr((kernel["name"], kernel["bundles"], kernel["loops"]))
        before = found.setdefault(code, {**kernel, "executions": 0, "unfit": 0})
        for runs in ("executions", "unfit"):
            unknown = before[runs] is None or kernel[runs] is None
            before[runs] = None if unknown else before[runs] + kernel[runs]
    return list(found.values())


def cost(kernels: Sequence[dict[str, Any]]) -> tuple[float, bool]:
    """Bundles issued in a step, and whether that is all: loops whose trips depend on data are counted once. What only
    unfit data need is not counted."""
    total, complete = 0.0, True
    for kernel in kernels:
        if kernel["executions"] == 0:
            continue
        loops = [Loop(**loop) for loop in kernel["loops"]]
        unknown = {index: 1.0 for index, loop in enumerate(loops) if loop.trips is None}
        outside = kernel["bundles"] - sum(loop.bundles for loop in loops)
        total += (1 if kernel["executions"] is None else kernel["executions"]) * (outside + weighted(loops, unknown))
        complete = complete and not unknown and kernel["executions"] is not None
    return total, complete


def comparison(found: dict[str, Any], scores: float) -> str:
    """Bundles per vector of scores beside flash attention's; `scores` are those in the support."""
    flash = found["flash"]
    own, complete = cost(found["kernels"])
    per_vector, theirs = own / (scores / VECTOR), flash["forward"] + flash["backward"]
    rows = [
        ["JAX's flash attention, forward", f"{flash['forward']:.2f}", f"{flash['forward_filled']:.2f}", ""],
        ["JAX's flash attention, backward", f"{flash['backward']:.2f}", f"{flash['backward_filled']:.2f}", ""],
    ]
    if found["kernels"]:
        bound = "" if complete else "at least "
        own_row = [f"{bound}{per_vector:.1f}", "", f"{bound}{per_vector / theirs:.1f} x"]
        rows.append(["these kernels, forward and backward", *own_row])
    note = (
        "flash attention: full support, tiles of 512 x 512, over all scores of its tiles; these kernels: over the\n"
        "scores of the support, so tiles that overlap a band's edge weigh more; what only unfit data need is not\n"
        "counted"
    )
    return f"{table(['static cost per 8 x 128 scores', 'bundles', 'filled', 'share'], rows)}\n{note}"


def projection(found: dict[str, Any], topology: Topology) -> str:
    """The time of a step as far as static figures go."""
    chip, share = topology.chip, topology.share(found["devices"])
    (pallas, complete), (fused, fused_complete) = cost(found["kernels"]), cost(found["fusions"])
    held = found["memory"]
    touched = held["arguments"] + held["outputs"] + 2 * held["temporaries"]
    rows = [
        ["Pallas kernels: bundles / clock", f"{pallas / chip.clock * 1e3:.3f}", "" if complete else "at least"],
        ["what XLA compiled: bundles / clock", f"{fused / chip.clock * 1e3:.3f}", "" if fused_complete else "at least"],
        ["HBM touched once: bytes / bandwidth", f"{touched / (chip.bandwidth * share) * 1e3:.3f}", "at least"],
    ]
    compute, bound = (pallas + fused) / chip.clock, "" if complete and fused_complete else "at least "
    step = max(compute, touched / (chip.bandwidth * share)) * 1e3
    return (
        f"{table(['projection, nothing was run', 'ms', ''], rows)}\n"
        f"projected step: {bound}{step:.3f} ms, the larger of computing and memory, if all is overlapped. Assumed: a\n"
        f"clock of {chip.clock / 1e9:g} GHz and {chip.bandwidth * share / 1e12:.2f} TB/s of HBM. Not counted: "
        "transfers between chips, waits for HBM, the host;\nloops whose trips depend on data count once"
    )


def _count(value: float | None) -> str:
    return "by data" if value is None else f"{value:,.0f}"


def _shortened(name: str) -> str:
    return name if len(name) <= 40 else name[:37] + "..."
