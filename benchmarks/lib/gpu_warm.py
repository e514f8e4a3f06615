"""Compiles what the other parts will launch into triton's cache, in as many processes as there are cores: one at a time
it would take minutes of a borrowed GPU."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from torch_sinkhorn_attn.engines.triton.launch import Chip, chip_of

from .gpu_launches import Case, bool_mask, distinct, dustbin, float_mask, launches, lengths, segments

TINY = Case("tiny", length=40, num=1, heads=2, width=16)


def cases() -> list[Case]:
    """Those that are timed or checked, and one for each option."""
    window, half = {"window": (128, 128)}, torch.bfloat16
    timed = [
        Case("vit", length=197, num=32, heads=12),
        Case("long", length=1024, num=8, heads=16),
        Case("band", length=16384, num=1, heads=8, numbers=window),
    ]
    full = torch.float32
    shapes = [("short", 100, half), ("long", 1024, half), ("short, float32", 100, full), ("long, float32", 1024, full)]
    options = {
        "plain": {}, "window": {"numbers": window}, "implicit": {"numbers": {"gradient": "implicit"}},
        "dropout": {"numbers": {"dropout_p": 0.1}}, "tolerance": {"numbers": {"tolerance": 1e-2}},
        "acceleration": {"numbers": {"acceleration": "chebyshev"}}, "relaxation": {"numbers": {"relaxation": 2.0}},
        "lengths": {"options": lengths}, "segments": {"options": segments}, "bool mask": {"options": bool_mask},
        "float mask": {"options": float_mask}, "dustbin": {"options": dustbin},
    }  # fmt: skip
    each = [
        Case(f"{name}, {shape}", length=length, dtype=dtype, **option)  # type: ignore[arg-type]
        for shape, length, dtype in shapes
        for name, option in options.items()
    ]
    return timed + each


def compile_case(case: Case, chip: Chip) -> str:
    """In a process of its own: what was compiled, or why not."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget(chip.backend, chip.arch, 64 if chip.backend == "hip" else 32)
    found = distinct(launches(case, chip))
    for launch in found:
        triton.compile(ASTSource(**launch.source()), target=target, options=launch.options)
    return f"{len(found)} kernels"


def warm(dry: bool) -> int:
    """Status 1 where a case does not compile."""
    if dry:
        print(f"{len(launches(TINY, chip_of(torch.device('cpu'))))} launches of a tiny problem noted")
        return 0
    chip, began, bad = chip_of(torch.device("cuda", torch.cuda.current_device())), time.perf_counter(), 0
    workers = min(16, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(compile_case, case, chip): case.name for case in cases()}
        for job in as_completed(jobs):
            try:
                said = job.result()
            except Exception as error:  # a line of the report
                said, bad = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}", 1
            print(f"  {time.perf_counter() - began:4.0f} s  {jobs[job]}: {said}", flush=True)
    return bad
