"""Whether the GPU engine computes what is defined, on the device: before any of its times mean anything."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_sinkhorn_attn import Dustbin, sinkhorn_attention
from torch_sinkhorn_attn.engines.base import each_tensor

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))  # the suite that every engine runs

import conformance
import problems

ENGINE = "triton"
FACTOR, FLOOR = 3.0, 1e-5  # of the error that plain float32 PyTorch makes; beside what it happens to get right
HALF = {torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of 16-bit inputs: the plan's tiles are rounded to them


def moved(call: problems.Call, device: torch.device, dtype: torch.dtype) -> problems.Call:
    """The same problem there, its real tensors in `dtype`, its leaves leaves."""
    known: dict[int, Tensor] = {}

    def one(x: Tensor) -> Tensor:
        if id(x) not in known:
            y = x.detach().to(device, dtype if x.is_floating_point() else x.dtype)
            known[id(x)] = y.clone().requires_grad_(x.requires_grad)
        return known[id(x)]

    def option(x: Any) -> Any:
        return each_tensor(x, one) if isinstance(x, (Tensor, tuple, Dustbin)) else x

    return replace(
        call,
        query=one(call.query),
        key=one(call.key),
        value=one(call.value),
        mask=None if call.mask is None else one(call.mask),
        options={name: option(x) for name, x in call.options.items()},
        leaves=[one(x) for x in call.leaves],
    )


def agreement(seed: int, device: torch.device, largest: int) -> str | None:
    """What is wrong with one random problem of the suite, None if nothing: against the definition in float64 on the
    CPU, by the error that it makes itself in float32."""
    drawn = problems.make(seed, torch.float32, dropout=False, largest=largest)
    drawn.options["tolerance"] = None  # which rounding may decide
    cpu = torch.device("cpu")
    exact = conformance.results(moved(drawn, cpu, torch.float64), "reference")
    plain = conformance.results(moved(drawn, cpu, torch.float32), "reference")
    found = conformance.results(moved(drawn, device, torch.float32), ENGINE)
    for name, y in exact.items():
        floor = 1.0 if "residual" in name else 1e-3
        error = conformance.relative_error(found[name].cpu().double(), y, floor)
        limit = max(FACTOR * conformance.relative_error(plain[name].double(), y, floor), FLOOR)
        if not error <= limit:
            return f"{name}: error {error:.1e}, limit {limit:.1e}, in {drawn}"
    return None


def conform(device: torch.device, seconds: float, most: int = 400, largest: int = 70) -> list[str]:
    """As many random problems as the time allows, small ones and larger ones in turn; what is wrong with them."""
    began, wrong, done = time.perf_counter(), [], 0
    for seed in range(most):
        if time.perf_counter() - began > seconds:
            break
        found = agreement(seed, device, largest if seed % 3 == 0 else 12)
        wrong += [found] if found else []
        done += 1
        if done % 20 == 0:
            print(f"  {done} random problems, {len(wrong)} wrong", flush=True)
    print(f"{done} random problems against the definition in float64: {len(wrong)} wrong")
    return wrong


def cases(length: int, long: int) -> dict[str, tuple[tuple[int, int, int, int], torch.dtype, dict[str, Any]]]:
    """What the other checks are made of: shapes for both kinds of kernels, and options of every kind."""
    small, large = (2, 3, length, 64), (1, 2, long, 64)
    window, half = {"window": (long // 8, long // 8)}, torch.bfloat16
    return {
        "resident, bfloat16": (small, half, {}),
        "resident, float32": (small, torch.float32, {}),
        "streaming, bfloat16": (large, half, {}),
        "streaming, float16": (large, torch.float16, {}),
        "window": (large, half, window),
        "window, float32, implicit": (large, torch.float32, window | {"gradient": "implicit"}),
        "dustbin": (large, half, {"dustbin": Dustbin(0.5, 0.5)}),
        "dropout": (large, half, {"dropout_p": 0.1}),
        "tolerance": (large, half, {"tolerance": 1e-2}),
        "acceleration": (large, half, window | {"acceleration": "chebyshev"}),
        "relaxation": (small, half, {"relaxation": 2.0}),
    }


def inputs_of(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(device, dtype).requires_grad_() for _ in range(3)]


def both(inputs: list[Tensor], engine: str, options: dict[str, Any]) -> list[Tensor]:
    """Output and gradients."""
    out = sinkhorn_attention(*inputs, engine=engine, **options)
    assert isinstance(out, Tensor)
    return [out.detach(), *torch.autograd.grad(out.float().sin().sum(), inputs)]


def properties(device: torch.device, length: int, long: int, only: tuple[str, ...] = ()) -> list[str]:
    """Agreement with the tiled engine, reruns, CUDA graphs and waiting, for each of `cases`, or `only` those named:
    what is wrong."""
    wrong: list[str] = []
    for name, (shape, dtype, options) in cases(length, long).items():
        if only and name not in only:
            continue
        for what, check in CHECKS.items():
            if device.type != "cuda" and what in CUDA_ONLY:
                continue
            try:
                found = check(inputs_of(shape, dtype, device), options)
            except Exception as error:  # any is a line of the table, not the end of it
                found = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
            wrong += [f"{name}: {what}: {found}"] if found else []
            print(f"  {name}: {what}: {found or 'good'}", flush=True)
    return wrong


def _agrees(inputs: list[Tensor], options: dict[str, Any]) -> str | None:
    """Against the tiled engine on the same inputs in float32, with the same dropout."""
    wide = [x.detach().float().requires_grad_() for x in inputs]
    torch.manual_seed(0)
    expected = both(wide, "tiled", options)
    torch.manual_seed(0)
    found = both(inputs, ENGINE, options)
    limit = HALF.get(inputs[0].dtype, 1e-3)
    errors = [conformance.relative_error(x.float(), y) for x, y in zip(found, expected, strict=True)]
    return None if max(errors) <= limit else f"errors {', '.join(f'{x:.1e}' for x in errors)}, limit {limit:.0e}"


def _repeats(inputs: list[Tensor], options: dict[str, Any]) -> str | None:
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(both(inputs, ENGINE, options))
    return None if all(map(torch.equal, *runs)) else "a rerun gives other bits"


def _captured(step: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor]) -> str | None:
    """A CUDA graph, replayed on other numbers, gives what a call gives."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(inputs)
        step(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step(inputs)
    with torch.no_grad():
        for x, y in zip(inputs, inputs_of(tuple(inputs[0].shape), inputs[0].dtype, inputs[0].device, 1), strict=True):
            x.copy_(y)
    graph.replay()
    replayed = [x.clone() for x in held]
    return None if all(map(torch.equal, replayed, step(inputs))) else "a replay gives other bits than a call"


def _graph_forward(inputs: list[Tensor], options: dict[str, Any]) -> str | None:
    def step(x: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            out = sinkhorn_attention(*x, engine=ENGINE, **options)
        assert isinstance(out, Tensor)
        return [out]

    return None if "dropout_p" in options else _captured(step, inputs)  # a replay draws another mask


def _graph_both(inputs: list[Tensor], options: dict[str, Any]) -> str | None:
    return None if "dropout_p" in options else _captured(lambda x: both(x, ENGINE, options), inputs)


def _waits(inputs: list[Tensor], options: dict[str, Any]) -> str | None:
    both(inputs, ENGINE, options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both(inputs, ENGINE, options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


CHECKS: dict[str, Callable[[list[Tensor], dict[str, Any]], str | None]] = {
    "agrees with tiled": _agrees,
    "a rerun is equal to the bit": _repeats,
    "waits for nothing": _waits,
    "CUDA graph, forward": _graph_forward,
    "CUDA graph, forward + backward": _graph_both,
}
CUDA_ONLY = ("waits for nothing", "CUDA graph, forward", "CUDA graph, forward + backward")
