"""SuperGlue's optimal transport: time, memory and error of ours, the plain loop, transformers, POT and OTT-JAX.

    python benchmarks/matching.py [--keypoints 512 1024 2048 4096] [--iterations 100] [--repeat 3] [--threads 2]
                                  [--clock wall] [--python OTHER] [--only ours loop ...] [--memory 6]

N x N scores, float32, dustbins with one shared score, the log plan and the gradient of SuperGlue's loss. Every function
lives in a process of its own; they take turns, and "ms" is the best of `--repeat` rounds after one to warm up. "peak
MiB" is what its resident set grew by in the first call, result and gradients included. "error" is the largest in the
first row of the log plan, and of the gradient (over its largest), against float64 through every iteration; the gradient
of the tail lacks by design what the iterations before it still contribute. "loop" and "transformers" are the same
operations: where their times differ it is by how the allocator gives matrices back. A function is left out where its
backward would keep more than `--memory` GiB. `--clock processor --threads 1` times the processor, if the machine does
other things too. What is not installed here is looked for in `--python`, another interpreter.

Then the loss at a score deviation of 20 in float32, through the logarithm of the plan and by the log plan.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

from benchmarks.lib.matching import CLOCKS, FUNCTIONS, given, installed, loss  # noqa: E402
from benchmarks.lib.measure import print_rows  # noqa: E402
from torch_sinkhorn_attn import Dustbin, sinkhorn_plan  # noqa: E402

WIDTHS = (-14, 10, 9, 9, 9, 9, -40)
ENOUGH = 60.0  # seconds a function takes in all before it sits out the rounds left


class Worker:
    """A function in a process of its own; a dead one is started again."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.name = name
        python = sys.executable if installed(name) or not arguments.python else arguments.python
        numbers = arguments.clock, str(arguments.iterations), str(arguments.threads)
        self.command = [python, "-m", "benchmarks.lib.matching", name, *numbers]
        self.surroundings = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(arguments.threads)}
        self.process: subprocess.Popen[str] | None = None
        self.missing: dict[str, Any] = {}

    def ask(self, **question: Any) -> dict[str, Any]:
        """The answer, or `{"missing": ...}`, or `{}` from one that died."""
        if self.missing:
            return self.missing
        if self.process is None:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                cwd=ROOT, env=self.surroundings,
            )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                self.missing = answer if "missing" in answer else {}
                return answer
        self.process.wait()
        self.process = None
        return {}

    def stop(self) -> None:
        if self.process is not None:
            self.process.communicate()


@dataclass
class Row:
    """What a function answered for one problem."""

    worker: Worker
    note: str = ""
    first: dict[str, Any] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)

    def start(self, problem: dict[str, Any], kept: float, limit: float) -> None:
        if problem["backward"] and FUNCTIONS[self.worker.name].keeps and kept > limit:
            self.note = f"left out: keeps {kept:.0f} GiB"
            return
        self.first = self.worker.ask(**problem)
        if "seconds" not in self.first:
            self.note = "not installed" if "missing" in self.first else "the process died (too much memory?)"

    def again(self) -> None:
        if "seconds" in self.first and sum(self.times) + self.first["seconds"] < ENOUGH:
            self.times += [x for name, x in self.worker.ask().items() if name == "seconds"]

    @property
    def seconds(self) -> float | None:
        found: float | None = min(self.times) if self.times else self.first.get("seconds")
        return found

    def errors(self, truth: dict[str, Any]) -> list[str]:
        found = []
        for what in ("log_plan", "grad"):
            mine, wanted = (torch.tensor(x.get(what) or [], dtype=torch.float64) for x in (self.first, truth))
            if mine.numel() == 0 or wanted.numel() == 0:
                found.append("")
                continue
            size = 1.0 if what == "log_plan" else wanted.abs().max()
            found.append(f"{float((mine - wanted).abs().max() / size):.1e}")
        return found


def table(workers: dict[str, Worker], keypoints: int, backward: bool, arguments: argparse.Namespace) -> None:
    what = "forward + backward" if backward else "forward"
    print(f"\n{keypoints} x {keypoints} keypoints, {arguments.iterations} iterations, {what}")
    problem: dict[str, Any] = {"keypoints": keypoints, "backward": backward}
    truth = workers["ours"].ask(**problem, dtype="float64")
    kept = 2 * 4 * arguments.iterations * keypoints**2 / 2**30
    rows = [Row(worker) for name, worker in workers.items() if FUNCTIONS[name].backward or not backward]
    for row in rows:
        row.start(problem | {"dtype": "float32"}, kept, arguments.memory)
    for _ in range(arguments.repeat):
        for row in rows:
            row.again()
    base = next((row.seconds for row in rows if row.worker.name == "ours"), None)
    lines: list[tuple[str, ...]] = [("function", "ms", "x ours", "peak MiB", "error", "error dS", "")]
    for row in rows:
        cells: tuple[str, ...] = ("",) * 5
        if row.seconds is not None:
            peak = row.first["peak"]
            ratio = f"{row.seconds / base:.2f}" if base else ""
            cells = f"{1e3 * row.seconds:.1f}", ratio, "" if peak is None else f"{peak / 2**20:.0f}", *row.errors(truth)
        lines.append((row.worker.name, *cells, row.note))
    print_rows(lines, WIDTHS)


def losses() -> None:
    """Of 256 keypoints, deviation 20: half of the partners are drawn, so that some have a very small probability."""
    print("\nSuperGlue's loss at a score deviation of 20, 256 keypoints, 100 iterations")
    results = {}
    for dtype in (torch.float64, torch.float32):
        at = given(256, 100, dtype, deviation=20.0)
        n, g = 256, torch.Generator().manual_seed(1)
        at = at._replace(scores=at.scores[:, :, torch.randperm(n, generator=g)])
        for way in ("log of the plan", "log plan"):
            scores = at.scores.clone().requires_grad_()
            bins, log = Dustbin.superglue(at.bin_score), way == "log plan"
            found = sinkhorn_plan(scores, log=log, dustbin=bins, base_iters=98, mask_floor=None)
            log_plan = found if log else found.log()
            total = loss(log_plan, at)
            results[way, dtype] = float(total.detach()), torch.autograd.grad(total, scores)[0].double()
    truth, gradient = results["log plan", torch.float64]
    print(f"  float64                   {truth:.6f}")
    for way in ("log of the plan", "log plan"):
        value, grad = results[way, torch.float32]
        error = float((grad - gradient).norm() / gradient.norm())
        print(f"  float32, {way:15}  {value:.6f}   gradient off by {error:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keypoints", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--memory", type=float, default=6.0, help="GiB that a backward may keep")
    parser.add_argument("--python", help="an interpreter that has the peers which this one lacks")
    parser.add_argument("--only", nargs="+", choices=list(FUNCTIONS))
    parser.add_argument("--quick", action="store_true", help="128 keypoints, one round: a trial, not a measurement")
    arguments, _ = parser.parse_known_args()
    if arguments.quick:
        arguments.keypoints, arguments.repeat = [128], 1
    print(f"torch {torch.__version__}, {arguments.threads} threads; the functions:")
    for name, function in FUNCTIONS.items():
        print(f"  {name:14} {function.gives}")
    chosen = [name for name in FUNCTIONS if name == "ours" or name in (arguments.only or FUNCTIONS)]
    workers = {name: Worker(name, arguments) for name in chosen}
    for keypoints in arguments.keypoints:
        for backward in (False, True):
            table(workers, keypoints, backward, arguments)
    for worker in workers.values():
        worker.stop()
    losses()


if __name__ == "__main__":
    main()
