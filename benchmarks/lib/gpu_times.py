"""Times and memory of the GPU engine beside softmax attention, compiled dense PyTorch, the tiled engine and
FlashSinkhorn."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_sinkhorn_attn import sinkhorn_attention

from . import gpu_peers
from .gpu_checks import ENGINE, inputs_of
from .measure import print_rows

Step = Callable[[list[Tensor]], Tensor]
BASE, TAIL, FEW, MANY = 20, 2, 2, 42
WIDTHS = (-26, 10, 10, 11, -40)


def sinkhorn(engine: str, **options: Any) -> Step:
    def step(x: list[Tensor]) -> Tensor:
        out = sinkhorn_attention(*x, engine=engine, base_iters=BASE, tail_iters=TAIL, **options)
        assert isinstance(out, Tensor)
        return out

    return step


def softmax(x: list[Tensor]) -> Tensor:
    return F.scaled_dot_product_attention(*x)


def _half(scores: Tensor, other: Tensor, dim: int) -> Tensor:
    return -torch.logsumexp(scores + other.unsqueeze(5 - dim), dim)


class Dense:
    """The plan in memory: plain PyTorch, each half-step compiled, the first T without autograd."""

    def __init__(self, compiled: bool) -> None:
        self.half = torch.compile(_half, dynamic=False) if compiled else _half

    def __call__(self, x: list[Tensor]) -> Tensor:
        query, key, value = x
        scores = (query @ key.transpose(-1, -2)).float() / query.shape[-1] ** 0.5
        row = scores.new_zeros(scores.shape[:-1])
        col = scores.new_zeros(*scores.shape[:-2], scores.shape[-1])
        with torch.no_grad():
            for _ in range(BASE):
                col = self.half(scores, row, 2)
                row = self.half(scores, col, 3)
        for _ in range(TAIL):
            col = self.half(scores, row, 2)
            row = self.half(scores, col, 3)
        return torch.exp(scores + row[..., None] + col[..., None, :]).to(value.dtype) @ value


def train(step: Step, inputs: list[Tensor]) -> Callable[[], object]:
    grad = torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(step(inputs), inputs, grad)


def infer(step: Step, inputs: list[Tensor]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return step(inputs)

    return run


class Clock:
    """Milliseconds of a call, the median of some, and the bytes it adds to what lies on the device."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.cuda, self.seconds = device.type == "cuda", seconds

    def __call__(self, run: Callable[[], object]) -> tuple[float, float]:
        run()  # compiles
        self._wait()
        before = torch.cuda.memory_allocated() if self.cuda else 0
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        run()
        self._wait()
        peak = torch.cuda.max_memory_allocated() - before if self.cuda else 0
        times: list[float] = []
        end = time.perf_counter() + self.seconds
        while len(times) < 3 or (len(times) < 50 and time.perf_counter() < end):
            times.append(self._once(run))
        return sorted(times)[len(times) // 2], peak / 2**20

    def _once(self, run: Callable[[], object]) -> float:
        if not self.cuda:
            began = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - began)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def table(
    title: str, functions: dict[str, Callable[[], object]], clock: Clock, target: tuple[str, str, float] | None = None
) -> None:
    """The functions' times, over the first one's, and how the target stands: (name, over name, at most this ratio)."""
    print(f"\n{title}", flush=True)
    print_rows([("function", "ms", f"x {next(iter(functions))}", "peak MiB", "")], WIDTHS)
    found: dict[str, float] = {}
    for name, run in functions.items():
        try:
            found[name], peak = clock(run)
        except Exception as error:  # out of memory, a compiler's: a line of the table, not the end of it
            print_rows([(name, "", "", "", f"{type(error).__name__}: {str(error).splitlines()[0][:90]}")], WIDTHS)
            continue
        ratio = found[name] / next(iter(found.values()))
        print_rows([(name, f"{found[name]:.3f}", f"{ratio:.2f}", f"{peak:.1f}", "")], WIDTHS)
    if clock.cuda and target is not None and target[0] in found and target[1] in found:
        ratio = found[target[0]] / found[target[1]]
        verdict = "reached" if ratio <= target[2] else "missed"
        print(f"  {target[0]} takes {ratio:.2f} times {target[1]} (target <= {target[2]:g}): {verdict}", flush=True)


def attention(device: torch.device, tiny: bool, seconds: float = 1.0) -> None:
    """Forward + backward, T = 20, R = 2, bfloat16, for the shapes that the targets are stated for."""
    clock = Clock(device, seconds)
    kept = torch.float32 if tiny else torch.bfloat16
    shapes = {(32, 12, 197, 64): 2.5, (8, 16, 1024, 64): 8.0} if not tiny else {(1, 1, 20, 16): 2.5}
    for shape, most in shapes.items():
        x = inputs_of(shape, kept, device)
        functions = {
            "softmax (SDPA)": train(softmax, x),
            ENGINE: train(sinkhorn(ENGINE), x),
            "tiled": train(sinkhorn("tiled"), x),
            "dense, compiled": train(Dense(not tiny), x),
            f"{ENGINE}, forward alone": infer(sinkhorn(ENGINE), x),
            "softmax, forward alone": infer(softmax, x),
        }
        table(f"{shape}, {kept}, forward + backward", functions, clock, (ENGINE, "softmax (SDPA)", most))
    for shape, window in (((1, 8, 16384, 64), 128),) if not tiny else (((1, 1, 40, 16), 4),):
        x = inputs_of(shape, kept, device)
        functions = {
            "softmax, all pairs (SDPA)": train(softmax, x),
            f"{ENGINE}, window": train(sinkhorn(ENGINE, window=(window, window)), x),
            "tiled, window": train(sinkhorn("tiled", window=(window, window)), x),
        }
        title = f"{shape}, {kept}, window ({window}, {window}), forward + backward"
        table(title, functions, clock, (f"{ENGINE}, window", "softmax, all pairs (SDPA)", 0.1))


def half_steps(device: torch.device, tiny: bool, seconds: float = 0.5) -> None:
    """A half-step, (T = 42 less T = 2) / 80, beside FlashSinkhorn's over as many points."""
    clock = Clock(device, seconds)
    for points in (4096, 16384) if not tiny else (20,):
        for dtype in (torch.bfloat16, torch.float32) if not tiny else (torch.float32,):
            x = inputs_of((1, 1, points, 64 if not tiny else 16), dtype, device)

            def steps(count: int, x: list[Tensor] = x) -> float:
                step = lambda y: sinkhorn_attention(*y, engine=ENGINE, base_iters=count, tail_iters=0)  # noqa: E731
                return clock(infer(step, x))[0]  # type: ignore[arg-type]

            ours = (steps(MANY) - steps(FEW)) / (2 * (MANY - FEW))
            line = f"half-step, {points} x {points} x {x[0].shape[-1]}, {dtype}: {1e3 * ours:.1f} us"
            if gpu_peers.installed() and device.type == "cuda":
                theirs = clock(gpu_peers.half_step(x[0][0, 0].detach(), x[1][0, 0].detach()))[0]
                verdict = "reached" if theirs >= 3 * ours else "missed"
                line += f"; FlashSinkhorn {1e3 * theirs:.1f} us, {theirs / ours:.2f} times (target >= 3): {verdict}"
            print(line, flush=True)
    if not gpu_peers.installed():
        print("FlashSinkhorn is not installed: pip install flash-sinkhorn")
