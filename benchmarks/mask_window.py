"""What a mask costs beside a narrow window: `python -m benchmarks.mask_window [TOKENS ...]`, in processor time of one
thread, so that other work on the machine does not count."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from torch_sinkhorn_attn import sinkhorn_attention


def seconds(run: Callable[[], object], repeats: int) -> float:
    run()
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return best


def forward(attend: Callable[[], torch.Tensor]) -> None:
    with torch.no_grad():
        attend()


def forward_and_backward(attend: Callable[[], torch.Tensor]) -> None:
    attend().sum().backward()


def main(lengths: list[int]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'tokens':>6}  {'window':8}  {'engine':6}  {'mask':12}  {'forward':>16}  {'and backward':>16}")
    for length in lengths:
        q, k, v = (torch.randn(1, 1, length, 32, requires_grad=True) for _ in range(3))
        keep = (torch.rand(length, length) < 0.97) | torch.eye(length, dtype=torch.bool)
        masks = {
            "none": None, "bool": keep, "float": torch.zeros(length, length).masked_fill(~keep, -torch.inf),
            "padding": torch.ones(1, length, dtype=torch.bool), "float padding": torch.zeros(1, length),
        }  # fmt: skip
        for window in ((8, 8), (64, 64)):
            for engine in ("cpu", "tiled"):
                alone: list[float] = []
                for name, mask in masks.items():
                    attend = partial(sinkhorn_attention, q, k, v, mask, window=window, engine=engine)
                    found = [seconds(partial(run, attend), 5) for run in (forward, forward_and_backward)]
                    alone = alone or found
                    cells = (f"{1e3 * x:8.1f} ms {x / y:3.1f}x" for x, y in zip(found, alone, strict=True))
                    print(f"{length:6}  {window!s:8}  {engine:6}  {name:12}  ", "  ".join(cells), flush=True)


if __name__ == "__main__":
    main([int(x) for x in sys.argv[1:]] or [2000, 16000])
