"""The GPU engine: what the compiler makes of its kernels, without a GPU; and on a GPU everything, in under 8 minutes.

    python benchmarks/gpu.py --static [--targets sm_80 sm_90 sm_100 gfx942]
    python benchmarks/gpu.py [--out FILE]
    python benchmarks/gpu.py --dry

--static: registers of a thread, bytes it spills, shared memory, whether the products are tensor-core instructions, and
the instructions of the loop for each score, beside softmax attention written in Triton and, where flash_sinkhorn is
installed, its half-step; d = 64, bfloat16. "a score" is a half-step's for half-steps, a pass's for what makes a pass;
a resident kernel's loop makes both half-steps in a turn. A multiprocessor issues 128 of them a cycle, and 16 MUFU.

Without it, on a GPU: first whether the engine is right (random problems of the suite against the definition in float64,
reruns equal to the bit, CUDA graphs, no waiting for the device), then times and memory beside softmax attention (SDPA),
compiled dense PyTorch, the tiled engine and FlashSinkhorn. Each part runs in a process of its own and has a time of its
own, at the end of which it is stopped. What is printed goes to the file too, with the date and the chip.

--dry: the same parts at tiny sizes on CPU tensors, by triton's interpreter: that it runs, no measurement.

The exit status is 0, 1 where a check failed or a part broke off, and 3 where there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
PARTS = {"compile": 60, "properties": 100, "conform": 120, "attention": 110, "half-steps": 60}  # seconds
OUT = Path(__file__).parent / "out"
NO_GPU = 3


def main() -> int:
    options = _parser().parse_args()
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    if options.static:
        from lib.gpu_table import table

        table(options.targets)
        return 0
    if options.part:
        return _part(options.part, options.dry)
    import torch

    if not options.dry and not torch.cuda.is_available():
        print(
            "No GPU is to be seen here; `python benchmarks/gpu.py --static` shows what its compiler makes of the "
            "kernels, and --dry that this benchmark runs.",
            file=sys.stderr,
        )
        return NO_GPU
    return _all(options)


def _all(options: argparse.Namespace) -> int:
    """Every part, each in a process of its own; the report."""
    import torch
    import triton

    chip = "no GPU, interpreted" if options.dry else torch.cuda.get_device_name()
    date = datetime.datetime.now().astimezone()
    where = options.out or OUT / f"gpu-{chip.replace(' ', '-').replace(',', '')}-{date:%Y%m%d-%H%M}.txt"
    where.parent.mkdir(parents=True, exist_ok=True)
    bad: list[str] = []
    with where.open("w") as file:

        def say(line: str) -> None:
            print(line, flush=True)
            print(line, file=file, flush=True)

        say(f"{chip}, {date:%d %B %Y %H:%M %Z}, torch {torch.__version__}, triton {triton.__version__}")
        for i, part in enumerate(PARTS):
            seconds = PARTS[part] * (5 if options.dry else 1)
            say(f"\n[{i + 1} of {len(PARTS)}] {part}, at most {seconds} s")
            began = time.perf_counter()
            status = _watched([part, *(["--dry"] if options.dry else [])], seconds, say)
            said = {0: "done", 1: "something is wrong"}.get(
                status, "stopped at its time" if status is None else "broke off"
            )
            say(f"[{i + 1} of {len(PARTS)}] {said} after {time.perf_counter() - began:.0f} s")
            late = status is None and part not in CHECKS  # a table may be cut short, a check may not
            bad += [] if status == 0 or late else [part]
        say(f"\n{'everything is right' if not bad else 'NOT right: ' + ', '.join(bad)}")
    print(f"wrote {where}")
    return 1 if bad else 0


CHECKS = ("properties", "conform")
DRY = ("resident, bfloat16", "window")


def _watched(arguments: list[str], seconds: float, say: Callable[[str], None]) -> int | None:
    """The exit status of a part, whose lines are said as they come; None if its time was over."""
    command = [sys.executable, "-u", __file__, "--part", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    over = threading.Event()

    def stop() -> None:
        over.set()
        os.killpg(process.pid, signal.SIGKILL)  # and the processes it has started

    clock = threading.Timer(seconds, stop)
    clock.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            say(line.rstrip("\n"))
        return None if process.wait() and over.is_set() else process.returncode
    finally:
        clock.cancel()
        if process.poll() is None:  # Ctrl-C
            stop()


def _part(name: str, dry: bool) -> int:
    import torch

    device = torch.device("cpu" if dry else "cuda")
    if name == "compile":
        from lib.gpu_warm import warm

        return warm(dry)
    if name in CHECKS:
        from lib import gpu_checks

        if name == "conform":
            wrong = gpu_checks.conform(device, 2.0 if dry else PARTS[name] - 20, most=3 if dry else 400, largest=20)
        else:
            wrong = gpu_checks.properties(device, *((12, 40, DRY) if dry else (100, 1024)))
        print("\n".join(wrong))
        return 1 if wrong else 0
    from lib import gpu_times

    (gpu_times.attention if name == "attention" else gpu_times.half_steps)(device, dry)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--static", action="store_true", help="what the compiler makes of the kernels; needs no GPU")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="of --static")
    parser.add_argument("--dry", action="store_true", help="tiny, on CPU tensors, by the interpreter: a trial")
    parser.add_argument("--out", type=Path, help="file for what is printed (default: in benchmarks/out)")
    parser.add_argument("--threads", type=int, help="taken for the sake of `make bench`")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
