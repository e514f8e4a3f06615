"""What a rank of a group does in tests, by name: `python tests/distributed/programs.py RANK SIZE STORE SECONDS NAME
...`, one group of processes for all tests of its size. `problems:FIRST:COUNT` are random problems; collectives time
out after so many seconds. Each program prints a line: its name, and what it found as JSON.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
import time
import unittest.mock
import weakref
from collections.abc import Callable
from typing import Any

import ranks
import torch
import torch.distributed as dist
import triton_interpreter
from torch import Tensor

from torch_sinkhorn_attn import (
    Dustbin,
    SinkhornMultiheadAttention,
    certify,
    sinkhorn_attention,
    sinkhorn_divergence,
    sinkhorn_matches,
    sinkhorn_plan,
    sinkhorn_plan_band,
)
from torch_sinkhorn_attn.distributed import sequence_parallel, wire
from torch_sinkhorn_attn.engines import cpu

TOKENS, HEADS, WINDOW = 24, 2, 3  # of the programs that count what is sent; tokens of each rank

PROGRAMS: dict[str, Callable[[int, int], Any]] = {}


def program(function: Callable[[int, int], Any]) -> Callable[[int, int], Any]:
    PROGRAMS[function.__name__] = function
    return function


def tokens(length: int, heads: int = 2, width: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key and value, the same on every rank."""
    g = torch.Generator().manual_seed(3)
    return [torch.randn(1, heads, length, width, generator=g, dtype=dtype) for _ in range(3)]


def own(x: Tensor, rank: int, size: int, dim: int = -2) -> Tensor:
    return x.tensor_split(size, dim)[rank]


def said(function: Callable[[], Any]) -> str:
    """The error a call raises."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@program
def disagreements(rank: int, size: int) -> dict[str, str]:
    """Ranks that pass different things: what each of them is told."""
    group = dist.group.WORLD
    q, k, v = (own(x, rank, size) for x in tokens(9))
    last = rank == size - 1

    def call(*given: Tensor, **options: Any) -> Callable[[], Any]:
        given = given or (q, k, v)
        return lambda: sinkhorn_attention(*given, sequence_group=group, **options)

    found = {
        "option": said(call(epsilon=0.5 if last else 1.0)),
        "absent": said(call(**({"relaxation": 2.0} if last else {}))),
        "dtype": said(call(*(x.float() if last else x for x in (q, k, v)))),
        "heads": said(call(*(x[:, :1] if last else x for x in (q, k, v)))),
        "grad": said(call(q.clone().requires_grad_(last), k, v)),
        "own": said(call(q, k[..., :3] if last else k, v)),
        "mass": said(call(row_mass=torch.ones(1 if last else q.shape[-2], dtype=q.dtype))),
        "mask": said(call(attn_mask=torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool))),
        "engine": said(call(engine="xla")),
        "balance": said(call(window=(2, 0))),
        "scores": said(lambda: sinkhorn_attention(q @ k.mT, None, v, sequence_group=group)),
        "log": said(lambda: sinkhorn_plan(q, k, log=last, sequence_group=group)),
        "k": said(lambda: sinkhorn_matches(q, k, k=2 + last, sequence_group=group)),
        "cotangent": said(lambda: certify(q, k, value=v, grad_output=v if last else v[..., 1:], sequence_group=group)),
        "band": said(lambda: sinkhorn_plan_band(q, k, sequence_group=group)),
    }
    attention = SinkhornMultiheadAttention(8, 2, add_zero_attn=True, dtype=q.dtype)
    x = torch.zeros(3, 1, 8, dtype=q.dtype)
    with sequence_parallel(group):
        found["alone"] = said(lambda: sinkhorn_divergence(q, k))
        found["module"] = said(lambda: attention(x, x, x))
    with unittest.mock.patch.object(cpu, "_unavailable", "not built" if last else None):
        found["kernels"] = said(call())
    again = call(window=(2, 2))()  # the group goes on
    assert torch.isfinite(again).all()
    return found


@program
def dead(rank: int, size: int) -> str:
    """The last rank ends in the middle; the others are told within the timeout."""
    q, k, v = (own(x, rank, size) for x in tokens(9))
    sinkhorn_attention(q, k, v, sequence_group=dist.group.WORLD)
    if rank == size - 1:
        os._exit(0)
    begun = time.monotonic()
    error = said(lambda: sinkhorn_attention(q, k, v, sequence_group=dist.group.WORLD))
    took = time.monotonic() - begun
    report("dead", f"{took:.1f} s: {error}")
    os._exit(0)  # the group cannot be left in order any more


@program
def absent(rank: int, size: int) -> str:
    """The last rank never makes the call."""
    q, k, v = (own(x, rank, size) for x in tokens(9))
    if rank == size - 1:
        time.sleep(8)
        os._exit(0)
    report("absent", said(lambda: sinkhorn_attention(q, k, v, sequence_group=dist.group.WORLD)))
    os._exit(0)


@program
def module(rank: int, size: int) -> dict[str, float]:
    """SinkhornMultiheadAttention in the context, padded, with a learned dustbin and dropout: output and gradients of
    parameters, summed over ranks, against one process."""
    length, found = 11, {}
    group = dist.group.WORLD
    for dustbin, masked in ((True, False), (False, True)):
        torch.manual_seed(1)
        attention = SinkhornMultiheadAttention(
            8, 2, batch_first=True, dropout=0.2, dustbin=dustbin, base_iters=5, dtype=torch.float64, window=(8, 8)
        )
        x = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
        padding = torch.arange(length) >= torch.tensor([[11], [9]])
        mask = torch.rand(length, length) < 0.1 if masked else None

        whole = _attended(attention, x, padding, mask)
        wanted = torch.autograd.grad((whole**2).sum(), [x, *attention.parameters()])
        shard = [None if y is None else own(y, rank, size, dim) for y, dim in ((x, 1), (padding, 1), (mask, 0))]
        with sequence_parallel(group):
            part = _attended(attention, *shard)
            compiled = _attended(torch.compile(attention, backend="eager"), *shard)
        assert torch.equal(part, compiled)
        grads = torch.autograd.grad((part**2).sum(), [x, *attention.parameters()])
        error = (part - own(whole, rank, size, 1)).abs().max().item() if part.numel() else 0.0
        error = max(error, _weights_differ(attention.eval(), (x, padding, mask), shard, group))
        for grad, y in zip(grads, wanted, strict=True):
            dist.all_reduce(grad)
            error = max(error, (grad - y).abs().max().item() / max(1.0, y.abs().max().item()))
        found[f"dustbin={dustbin}"] = error
    return found


def _weights_differ(attention: SinkhornMultiheadAttention, whole: Any, shard: Any, group: Any) -> float:
    """Weights of the rows here, averaged, by head and as a band, and their gradients, against one process."""
    (x, padding, mask), (local, local_padding, local_mask), error = whole, shard, 0.0
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    for kind, averaged in ((True, True), (True, False), ("band", True)):
        options: Any = {"need_weights": kind, "average_attn_weights": averaged}
        _, expected = attention(x, x, x, padding, attn_mask=mask, **options)
        out, found = attention(
            local, local, local, local_padding, attn_mask=local_mask, sequence_group=group, **options
        )
        if kind == "band":
            assert torch.equal(found.first_column, own(expected.first_column, rank, size, -1))
            expected, found = expected.values, found.values
        error = max(error, (found - own(expected, rank, size, -2)).abs().max().item() if found.numel() else 0.0)
        pairs = [torch.autograd.grad((y**2).sum() + 0 * out.sum(), x, retain_graph=True)[0] for y in (found, expected)]
        dist.all_reduce(pairs[0])
        error = max(error, (pairs[0] - pairs[1]).abs().max().item())
    return error


def _attended(attention: SinkhornMultiheadAttention, x: Tensor, padding: Tensor, mask: Tensor | None) -> Tensor:
    torch.manual_seed(5)  # of dropout
    return attention(x, x, x, padding, need_weights=False, attn_mask=mask)[0]


@program
def compiled(rank: int, size: int) -> dict[str, float]:
    """A whole graph under torch.compile against eager calls: values and gradients."""
    return _compiled(rank, size, ("by_module",))


@program
def compiled_others(rank: int, size: int) -> dict[str, float]:
    """Likewise of what may have more columns than a program knows, which needs dynamic shapes."""
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    return _compiled(rank, size, ("with_weights", "with_band", "by_scores", "with_aux", "log_plan"))


def _compiled(rank: int, size: int, names: tuple[str, ...]) -> dict[str, float]:
    group, found = dist.group.WORLD, {}
    q, k, v = (own(x, rank, size).requires_grad_() for x in tokens(11))
    bin_score = torch.tensor(0.3, dtype=q.dtype, requires_grad=True)
    ids = own(torch.tensor([3] * 5 + [4] * 6), rank, size, -1)[None]
    packed = {"query_segment_ids": ids, "key_segment_ids": ids, "base_iters": 4}
    torch.manual_seed(0)
    attention = SinkhornMultiheadAttention(8, 2, batch_first=True, dropout=0.2, dustbin=True, window=(4, 4)).double()
    x = own(torch.randn(2, 11, 8, dtype=q.dtype), rank, size, 1).requires_grad_()
    scores = (q @ wire.Wire(group).gathered(k.detach(), [4, 4, 3], -2).mT).detach().requires_grad_()

    def by_module() -> list[Any]:
        return [attention(x, x, x, need_weights=False)[0]]

    def with_weights() -> list[Any]:
        return [*attention(x, x, x, average_attn_weights=False)]

    def with_band() -> list[Any]:
        output, band = attention(x, x, x, need_weights="band")
        return [output, band.values, band.first_column]

    def by_scores() -> list[Any]:
        return [sinkhorn_attention(scores, None, v, base_iters=4, row_mass=torch.full((1,), 2.0, dtype=q.dtype))]

    def with_aux() -> list[Any]:
        output, aux = sinkhorn_attention(q, k, v, dustbin=Dustbin(bin_score, 0.1), return_aux=True, **packed)
        return [output, *aux]

    def log_plan() -> list[Any]:
        return [sinkhorn_plan(q, k, log=True, dustbin=Dustbin(bin_score, 0.1), **packed).exp()]

    leaves = [x, q, k, v, bin_score, scores, *attention.parameters()]
    functions = (by_module, with_weights, with_band, by_scores, with_aux, log_plan)
    for function in (x for x in functions if x.__name__ in names):
        results = []
        with sequence_parallel(group):
            for run in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
                torch.manual_seed(5)
                outputs = run()
                loss = sum((y**2).sum() for y in outputs if y.requires_grad)
                grads = torch.autograd.grad(loss, leaves, allow_unused=True)
                results.append([*outputs, *(g for g in grads if g is not None)])
        assert len(results[0]) == len(results[1])
        errors = [float((a - b).detach().abs().max()) for a, b in zip(*results, strict=True) if a.numel()]
        found[function.__name__] = max(errors)
    return found


@program
def dtensors(rank: int, size: int) -> list[float]:
    """DTensors sharded along the sequence over one dimension of a mesh, the batch over the other."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "cp"))
    g = torch.Generator().manual_seed(2)
    whole = [torch.randn(2, 2, 9, 4, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    expected = sinkhorn_attention(*whole, window=(3, 3))
    wanted = torch.autograd.grad((expected**2).sum(), whole)
    given = [distribute_tensor(x.detach(), mesh, [Shard(0), Shard(2)]).requires_grad_() for x in whole]
    found = sinkhorn_attention(*given, window=(3, 3))
    assert found.shape == expected.shape and found.placements == given[0].placements
    (found.to_local() ** 2).sum().backward()
    errors = [(found.full_tensor() - expected).abs().max().item()]
    errors += [(x.grad.full_tensor() - y).abs().max().item() for x, y in zip(given, wanted, strict=True)]
    plan = sinkhorn_plan(*given[:2], window=(3, 3))
    assert plan.placements == given[0].placements
    errors.append((plan.full_tensor() - sinkhorn_plan(*whole[:2], window=(3, 3))).abs().max().item())
    at = mesh.get_coordinate()
    matches, of_all = (sinkhorn_matches(*x[:2], window=(3, 3)).row_index for x in (given, whole))
    assert torch.equal(matches, own(own(of_all, at[0], 2, 0), at[1], size // 2, 2))
    assert "is no DTensor" in said(lambda: sinkhorn_plan(*given[:2], dustbin=Dustbin(0.0, 0.0)))
    assert "placements" in said(
        lambda: sinkhorn_attention(given[0].redistribute(mesh, [Shard(2), Shard(2)]), *given[1:])
    )
    plain = sinkhorn_attention(*(x.to_local() for x in given), window=(3, 3), sequence_group=mesh["cp"])
    assert torch.equal(plain, found.to_local())
    assert "2 dimensions" in said(lambda: sinkhorn_attention(*whole, sequence_group=mesh))
    return errors


@program
def meshes(rank: int, size: int) -> dict[str, list[float]]:
    """Losses of a small encoder on a mesh of data by sequence, under DDP and FSDP2, and those of one process."""
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "cp"))
    g = torch.Generator().manual_seed(4)
    data, target = (torch.randn(4, 14, 8, generator=g, dtype=torch.float64) for _ in range(2))
    mine = [own(own(x, rank // 2, 2, 0), rank % 2, 2, 1) for x in (data, target)]
    losses = {}
    for kind in ("one", "ddp", "fsdp"):
        torch.manual_seed(0)
        model: Any = nn.Sequential(*(_Block() for _ in range(2))).double()
        if kind == "ddp":  # over all ranks: a replica for each shard of tokens as for each of samples
            model = nn.parallel.DistributedDataParallel(model)
        elif kind == "fsdp":
            flat = mesh._flatten("all")
            for block in model:
                fully_shard(block, mesh=flat)
            fully_shard(model, mesh=flat)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        losses[kind] = []
        x, y = (data, target) if kind == "one" else mine
        for _ in range(4):
            with sequence_parallel(None if kind == "one" else mesh["cp"]):
                loss = (model(x) - y).square().mean()  # shards are of one size, so the mean of means is the mean
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total = loss.detach()
            if kind != "one":
                dist.all_reduce(total)
                total /= size
            losses[kind].append(total.item())
    return losses


class _Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = SinkhornMultiheadAttention(8, 2, batch_first=True, window=(5, 5), dustbin=True, base_iters=5)
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.attention(x, x, x, need_weights=False)[0])


@program
def traffic(rank: int, size: int) -> dict[str, float]:
    """Bytes and messages of one half-step of the columns, from two calls that differ in one iteration."""
    g = torch.Generator().manual_seed(rank)
    q, k, v = (torch.randn(1, HEADS, TOKENS, 4, generator=g, dtype=torch.float64) for _ in range(3))
    found: dict[str, float] = {"tokens": TOKENS, "heads": HEADS, "window": WINDOW}
    for name, options in (("band", {"window": (WINDOW, WINDOW)}), ("full", {})):
        sent = []
        for base_iters in (3, 4):
            before = dataclasses.replace(wire.traffic)
            sinkhorn_attention(q, k, v, base_iters=base_iters, sequence_group=dist.group.WORLD, **options)
            sent.append((wire.traffic.bytes - before.bytes, wire.traffic.messages - before.messages))
        found |= {f"{name} bytes": round(sent[1][0] - sent[0][0]), f"{name} messages": sent[1][1] - sent[0][1]}
    return found


def report(name: str, found: Any) -> None:
    print(f"FOUND {name} {json.dumps(found)}", flush=True)


def main(rank: int, size: int, store: str, seconds: float, names: list[str]) -> None:
    ranks.start(rank, size, store, seconds)
    for name in names:
        kind, *numbers = name.split(":")
        if kind == "problems":
            report(kind, ranks.disagreements(rank, size, *map(int, numbers)))
        elif kind == "kernels":
            triton_interpreter.quicken()
            report(kind, ranks.disagreements_of_kernels(rank, size, *map(int, numbers)))
        else:
            report(name, PROGRAMS[name](rank, size))
    group = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    gc.collect()
    assert group() is None, "the process group is kept, so gloo's threads may abort the process as it ends"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4]), sys.argv[5:])
