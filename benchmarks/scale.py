"""A sequence sharded over processes: half-steps, messages, bytes and memory here, and a projection to many devices.

    python benchmarks/scale.py [--ranks 1 2 4] [--tokens 4096] [--window 256] [--full 512] [--rounds 3]
    python benchmarks/scale.py --engines

First processes of this machine, over gloo, one thread each. Weak scaling: `--tokens` per rank in a band, `--full` per
rank on full support. "x one" is the time of an iteration over that of one process, which with more processes than
cores cannot stay 1. "cpu ms" is the processor time of the busiest rank, all its threads; who waits for a message
sleeps. "alone" is that of the same tokens by the same kernels in a group of one, taken in turn with it at the same
time on the same cores, so whatever else the machine does slows both: "x alone", over the work that a rank has beside
it, is what weak scaling can mean here. Messages and bytes are those that the busiest rank sends in one iteration.
Strong scaling: a band of `--tokens` times the most ranks in all, and what a training step keeps between forward and
backward, and adds to the process at its peak, on each rank. `--engine tiled` takes tiles of plain PyTorch in place of
the C++ kernels.

Then a PROJECTION, which measures nothing: what an iteration of a band over `--length` tokens would take on 8 to 4096
devices, from `--entries` score entries a second and device, and `--latency` and `--bandwidth` of the interconnect;
beside softmax by ring attention at the same length, whose keys and values go round all devices, in full, and hidden
behind the matrix products where those take longer. These inputs are assumptions: replace them by your own.

`--engines` measures something else: an iteration and a backward in one process, in processor time, by tiles of plain
PyTorch and by the C++ kernels as ranks use them, in half-steps, beside those kernels' whole solves.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from lib.measure import print_rows
from lib.memory import grown

from torch_sinkhorn_attn import sinkhorn_attention

HEADS, WIDTH, FEW, MANY = 4, 64, 2, 6  # iterations of two calls whose difference tells of one
DEVICES = (8, 64, 256, 1024, 4096)


def own_tokens(count: int, grad: bool) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(dist.get_rank())
    return [torch.randn(1, HEADS, count, WIDTH, generator=g).requires_grad_(grad) for _ in range(3)]


def iteration(count: int, window: tuple[int, int] | None, rounds: int, engine: str) -> dict[str, float]:
    """Seconds, of the clock and of processors, bytes and messages of one iteration of `count` tokens on each rank."""
    from torch_sinkhorn_attn.distributed.wire import traffic

    tokens, sent = own_tokens(count, False), {}
    single = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    ways: dict[str, Any] = {"group": dist.group.WORLD, "alone": single}
    taken: dict[tuple[str, int], list[tuple[float, float]]] = {(x, k): [] for x in ways for k in (FEW, MANY)}
    for k in range(rounds + 1):
        for (way, iterations), times in taken.items():
            before = replace(traffic)
            dist.barrier()
            start = time.perf_counter(), time.process_time()
            sinkhorn_attention(*tokens, window=window, base_iters=iterations, sequence_group=ways[way], engine=engine)
            if k:
                times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
            sent[way, iterations] = traffic.bytes - before.bytes, traffic.messages - before.messages

    def each(way: str, kind: int) -> float:
        few, many = (median(x[kind] for x in taken[way, k]) for k in (FEW, MANY))
        return (many - few) / (MANY - FEW)

    bytes_and_messages = zip(sent["group", MANY], sent["group", FEW], strict=True)
    wire = [(a - b) / (MANY - FEW) for a, b in bytes_and_messages]
    found = {"seconds": each("group", 0), "processor": each("group", 1), "alone": each("alone", 1)}
    return {**found, "bytes": wire[0], "messages": wire[1]}


def memory(count: int, window: tuple[int, int], engine: str) -> dict[str, float]:
    """What a training step keeps, and what the process grows by."""
    kept: list[int] = []
    tokens = own_tokens(count, True)

    def attend(tokens: list[torch.Tensor]) -> torch.Tensor:
        group = dist.group.WORLD
        return sinkhorn_attention(*tokens, window=window, base_iters=3, sequence_group=group, engine=engine)

    def step() -> None:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
            out = attend(tokens)
        out.sum().backward()

    small = [x[..., :64, :].detach().requires_grad_() for x in tokens]
    attend(small).sum().backward()
    _, peak = grown(step)
    return {"kept": sum(kept), "peak": float("nan") if peak is None else peak}


def rank_main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    store = f"file://{arguments.store}"
    dist.init_process_group("gloo", init_method=store, rank=arguments.rank, world_size=arguments.size)
    window = (arguments.window, arguments.window)
    found = {
        "band": iteration(arguments.tokens, window, arguments.rounds, arguments.engine),
        "full": iteration(arguments.full, None, arguments.rounds, arguments.engine),
        "strong": memory(arguments.tokens * max(arguments.ranks) // arguments.size, window, arguments.engine),
    }
    print("FOUND", json.dumps(found), flush=True)
    dist.destroy_process_group()


def group(size: int) -> list[dict[str, Any]]:
    """What every rank of a group of processes found."""
    with tempfile.TemporaryDirectory() as folder:
        common = [sys.executable, __file__, *sys.argv[1:], "--size", str(size), "--store", str(Path(folder) / "store")]
        paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(paths)}
        running = [
            subprocess.Popen([*common, "--rank", str(rank)], stdout=subprocess.PIPE, text=True, env=environment)
            for rank in range(size)
        ]
        outputs = [process.communicate()[0] for process in running]
    return [json.loads(line[6:]) for out in outputs for line in out.splitlines() if line.startswith("FOUND ")]


def measured(arguments: argparse.Namespace) -> float:
    """Print what this machine does; seconds of an iteration of one process in a band."""
    found = {size: group(size) for size in arguments.ranks}
    print(f"{HEADS} heads of {WIDTH}, float32, {os.cpu_count()} cores; one iteration, weak scaling")
    widths = (-6, 6, 10, 8, 10, 10, 9, 9, 9, 12)
    print_rows([("", "ranks", "ms", "x one", "cpu ms", "alone", "x alone", "x work", "messages", "bytes")], widths)
    one: dict[str, float] = {}
    for kind in ("band", "full"):
        for size, ranks in found.items():
            seconds, processor, alone, messages, sent = (
                max(x[kind][y] for x in ranks) for y in ("seconds", "processor", "alone", "messages", "bytes")
            )
            ratio = max(x[kind]["processor"] / x[kind]["alone"] for x in ranks)
            work = 1 if kind == "band" else size  # on full support every row meets all columns
            times = f"{seconds * 1e3:.1f}", f"{seconds / one.setdefault(kind, seconds):.2f}"
            times += f"{processor * 1e3:.1f}", f"{alone * 1e3:.1f}", f"{ratio:.2f}", f"{ratio / work:.2f}"
            print_rows([(kind, str(size), *times, f"{messages:.0f}", f"{sent:,.0f}")], widths)
    total = arguments.tokens * max(arguments.ranks)
    print(f"\nA training step of {total} tokens in a band, strong scaling: the largest rank")
    print_rows([("ranks", "kept MiB", "x one", "peak MiB", "x one")], (6, 10, 8, 10, 8))
    first = None
    for size, ranks in found.items():
        kept, peak = (max(x["strong"][y] for x in ranks) for y in ("kept", "peak"))
        first = first or (kept * size, peak * size)
        ratios = [f"{x / y:.3f}" for x, y in zip((kept, peak), first, strict=True)]
        print_rows([(str(size), f"{kept / 2**20:.2f}", ratios[0], f"{peak / 2**20:.1f}", ratios[1])], (6, 10, 8, 10, 8))
    return one["band"]


def engines(rounds: int) -> None:
    """What a rank computes with, and what one device does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    ranks: dict[str, Any] = {"sequence_group": dist.group.WORLD}
    ways = ({"engine": "tiled"} | ranks, MANY), ({"engine": "cpu"} | ranks, 40), ({"engine": "cpu"}, 100)
    print(f"{HEADS} heads of {WIDTH}, float32, one thread: ms of processor time of an iteration and of a backward, by")
    print("tiles, by C++ in half-steps, and by C++ in one solve; how much slower the first two are")
    widths = (-24, 10, 8, 8, 16, 10, 8, 8, 16)
    names = ("tiles", "C++", "solve", "slower")
    print_rows([("", *(f"{x} it" for x in names), *(f"{x} bwd" for x in names))], widths)
    for tokens, window in ((4096, 256), (4096, 64), (512, None), (2048, None)):
        sides = None if window is None else (window, window)
        found = [by_engine(tokens, sides, many, rounds, options) for options, many in ways]
        numbers: list[str] = []
        for tiles, kernels, solve in zip(*found, strict=True):
            numbers += [f"{x:.2f}" for x in (tiles, kernels, solve)] + [f"{tiles / solve:.1f}, {kernels / solve:.1f}"]
        print_rows([(f"{tokens} tokens, " + ("all pairs" if window is None else f"window {window}"), *numbers)], widths)


def by_engine(
    tokens: int, window: tuple[int, int] | None, many: int, rounds: int, options: dict[str, Any]
) -> tuple[float, float]:
    """ms of an iteration, from calls of few and of `many`, and of a backward."""
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, HEADS, tokens, WIDTH, generator=g).requires_grad_() for _ in range(3)]

    def taken(function: Callable[[], object]) -> float:
        times = []
        for _ in range(rounds + 1):
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
        return median(times[1:]) * 1e3

    def attend(iterations: int) -> torch.Tensor:
        return sinkhorn_attention(*leaves, base_iters=iterations, window=window, **options)

    iteration = (taken(partial(attend, many)) - taken(partial(attend, FEW))) / (many - FEW)
    return iteration, taken(partial(torch.autograd.grad, attend(20).sum(), leaves, retain_graph=True))


def projected(arguments: argparse.Namespace) -> None:
    length, entry = arguments.length, arguments.entries
    latency, bandwidth, halo = arguments.latency, arguments.bandwidth, arguments.halo
    print(
        f"\nPROJECTION, not a measurement: {length:,} tokens, window ({halo}, {halo}), {HEADS} heads of "
        f"{WIDTH}. Assumed: "
        f"{entry:.3g} score entries/s a device, latency {latency:.3g} s, {bandwidth:.3g} bytes/s a link and "
        f"direction,\n"
        f"bfloat16 keys and values, float32 vectors, T + R = {arguments.iterations}; softmax at {arguments.flops:.3g} "
        "multiply-adds/s a device. Efficiency: what part of the time is not the wire's."
    )
    widths = (8, 9, 12, 10, 10, 11, 13, 13, 11)
    head = ("devices", "tokens", "band bytes", "ms", "efficient", "full bytes", "ring bytes", "ring ms", "efficient")
    print_rows([head], widths)
    for devices in DEVICES:
        tokens = length // devices
        overlaps = range(2 * halo, 0, -tokens)  # columns shared with the next rank on a side, the one after, ...
        sent = 2 * sum(overlaps) * HEADS * 4
        column_and_row = 2 * tokens * (2 * halo + 1) * HEADS / entry
        wire = len(overlaps) * latency + sent / 2 / bandwidth  # the two sides at once
        full = 2 * (devices - 1) / devices * length * HEADS * 4
        ring_bytes = 2 * tokens * HEADS * WIDTH * 2 * (devices - 1)
        ring_step = 2 * tokens * tokens * HEADS * WIDTH / arguments.flops
        hop = latency + 2 * tokens * HEADS * WIDTH * 2 / bandwidth
        ring = ring_step + (devices - 1) * max(ring_step, hop)
        times = arguments.iterations * (column_and_row + wire)
        print_rows(
            [
                (
                    f"{devices:,}", f"{tokens:,}", f"{sent:,}", f"{times * 1e3:.3f}",
                    f"{column_and_row / (column_and_row + wire):.3f}", f"{full:,.0f}", f"{ring_bytes:,}",
                    f"{ring * 1e3:.3f}", f"{devices * ring_step / ring:.3f}",
                )
            ],
            widths,
        )  # fmt: skip
    print(
        "band bytes and full bytes: sent by a device in one iteration, in the band and on full support. ring "
        "bytes: in one "
        "forward of softmax, all of it."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=4096, help="of a rank, in a band")
    parser.add_argument("--full", type=int, default=512, help="of a rank, on full support")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=1 << 20, help="projection: tokens in all")
    parser.add_argument("--halo", type=int, default=512, help="projection: window on either side")
    parser.add_argument("--iterations", type=int, default=22, help="projection: T + R")
    parser.add_argument("--entries", type=float, default=1e11, help="projection: score entries a second and device")
    parser.add_argument("--flops", type=float, default=2e14, help="projection: multiply-adds a second and device")
    parser.add_argument("--latency", type=float, default=5e-6, help="projection: seconds a message")
    parser.add_argument("--bandwidth", type=float, default=5e10, help="projection: bytes a second")
    parser.add_argument("--projection-only", action="store_true")
    parser.add_argument("--engines", action="store_true")
    parser.add_argument("--engine", choices=["cpu", "tiled"], default="cpu")
    for name in ("--rank", "--size"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    arguments, _ = parser.parse_known_args()
    if arguments.rank is not None:
        return rank_main(arguments)
    if arguments.engines:
        return engines(arguments.rounds)
    if not arguments.projection_only:
        seconds = measured(arguments)
        pairs = 2 * arguments.tokens * (2 * arguments.window + 1) * HEADS / seconds
        print(f"One process here: {pairs:.3g} score entries/s (--entries)")
    projected(arguments)


if __name__ == "__main__":
    main()
