"""torch_xla with the tokens of problems over the devices of a mesh, against the dense definition on the CPU, float64:
output, aux and all gradients to 1e-10. Run by engines/xla/test_sequence.py, with CPU_NUM_DEVICES set.

    python tests/xla_sequence.py CASE... | FIRST:COUNT...

A case is one of `CASES`; FIRST:COUNT are random problems of `problems.make`, by seed. Prints a line for each.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

os.environ |= {"PJRT_DEVICE": "CPU", "NPROC": "16"}  # threads that devices wait in for each other

import conformance
import numpy as np
import problems
import torch
import torch_xla
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import Tensor
from torch_xla import _XLAC  # type: ignore[attr-defined]

from torch_sinkhorn_attn import Dustbin, sinkhorn_attention
from torch_sinkhorn_attn.engines.xla import spmd
from torch_sinkhorn_attn.problem import arguments

D = torch.float64
COLLECTIVES = "collective-permute(", "all-gather(", "all-to-all(", "reduce-scatter(", "all-reduce("


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def attention(
    lengths: tuple[int, int] = (24, 24), heads: int = 2, key_heads: int = 2, mask: Tensor | None = None, **options: Any
) -> problems.Call:
    tokens = [
        randn(2, h, n, 4, seed=i).requires_grad_()
        for i, (h, n) in enumerate([(heads, lengths[0]), *[(key_heads, lengths[1])] * 2])
    ]
    leaves = [*tokens, *([mask.requires_grad_()] if mask is not None and mask.is_floating_point() else [])]
    return problems.Call(0, *tokens, mask, {"enable_gqa": True, "base_iters": 4, **options}, leaves)


def packed(length: int = 24, size: int | None = None) -> dict[str, Tensor]:
    rows, cols = (
        torch.tensor([0] * 7 + [1] * 6 + [-1] * 2 + [2] * (n - 15)).expand(2, n).contiguous()
        for n in (length, length if size is None else size)
    )
    return {"query_segment_ids": rows, "key_segment_ids": rows if size is None else cols}


def padded(length: int = 24) -> dict[str, Tensor]:
    lengths = torch.tensor([length, length - 7])
    return {"query_lengths": lengths, "key_lengths": lengths}


def dustbin(length: int = 24) -> dict[str, Dustbin]:
    scores = randn(2, 2, length, seed=5), randn(2, 1, seed=6), randn(2, seed=7)
    return {"dustbin": Dustbin(*(x.requires_grad_() for x in scores), value=randn(2, 4, seed=8).requires_grad_())}


CASES: dict[str, Callable[[], problems.Call]] = {
    "band": lambda: attention(window=(3, 3)),
    "band, lengths": lambda: attention(window=(3, 2), acceleration="chebyshev", **padded()),
    "band, segments, dropout": lambda: attention(window=(2, 3), dropout_p=0.3, **packed()),
    "band, dustbin, ragged": lambda: attention((23, 23), window=(2, 3), **dustbin(23), **padded(23)),
    "band, rectangular": lambda: attention((24, 48), 4, 1, window=(4, 5), tail_iters=0),
    "full, mask of one row": lambda: attention((24, 18), mask=randn(1, 18, seed=4)),
    "full, mask, a row or none": lambda: attention((2, 6), mask=randn(2, 2, 2, 6, seed=4)),
    "full, mask, segments, ragged": lambda: attention(
        (23, 17), mask=randn(2, 1, 23, 17, seed=4), gradient="implicit", relaxation=(None, 2.0), **packed(23, 17)
    ),
    "full, masses": lambda: attention((22, 18), row_mass=randn(2, 2, 22).exp(), gradient="implicit"),
}


def on_mesh(x: Any, device: torch.device) -> Any:
    """The tensors of a value there, leaves as leaves."""
    if isinstance(x, Tensor):
        return x.detach().to(device).requires_grad_(x.requires_grad)
    if isinstance(x, Dustbin):
        return Dustbin(**{name: on_mesh(value, device) for name, value in vars(x).items()})
    if isinstance(x, dict):
        known: dict[int, Any] = {}  # what is one tensor stays one
        return {name: known.setdefault(id(value), on_mesh(value, device)) for name, value in x.items()}
    return tuple(on_mesh(value, device) for value in x) if isinstance(x, tuple) else x


def leaves_of(call: problems.Call) -> list[Tensor]:
    bins = [vars(x).values() for x in call.options.values() if isinstance(x, Dustbin)]
    found = [call.query, call.key, call.value, call.mask, *(x for values in bins for x in values)]
    return [x for x in found if isinstance(x, Tensor) and x.requires_grad]


def results(call: problems.Call, engine: str) -> dict[str, Tensor]:
    """Output, aux, and the gradients of a loss on all that is differentiable."""
    tokens = call.query, call.key, call.value, call.mask
    output, aux = sinkhorn_attention(*tokens, engine=engine, return_aux=True, **call.options)
    found = {"output": output} | {k: v for k, v in aux._asdict().items() if v is not None}
    loss = (output * conformance.weights(output.cpu().detach() * 0).to(output.device)).sum()
    if aux.row_dustbin is not None:
        loss = loss + aux.row_dustbin.square().sum() + aux.col_dustbin.sin().sum()
    leaves = leaves_of(call)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    for i, (x, g) in enumerate(zip(leaves, gradients, strict=True)):
        found[f"gradient {i} {list(x.shape)}"] = torch.zeros_like(x) if g is None else g
    return {name: x.detach() for name, x in found.items()}


def check(name: str, call: problems.Call, mesh: xs.Mesh, marked: bool) -> str:
    """By the annotation of query, or by `spmd.sharding`.

    Raises:
        AssertionError: what differs.
    """
    try:
        expected = results(call, "reference")
    except ValueError as error:  # a drawn window or mask may leave no plan
        return f"{name}: refused on one device: {error}"
    device = torch_xla.device()
    there = problems.Call(call.seed, *(on_mesh(x, device) for x in (call.query, call.key, call.value, call.mask)))
    there.options = on_mesh(call.options, device)
    batch = "data" if call.query.ndim > 3 and "data" in mesh.shape() else None
    if marked:
        xs.mark_sharding(there.query, mesh, (batch, *[None] * (call.query.ndim - 2), "cp", None)[-call.query.ndim :])
    with nullcontext() if marked else spmd.sharding(mesh, batch=batch, sequence="cp"):
        found = results(there, "xla")
    text = _XLAC._get_xla_tensors_hlo(list(found.values()))
    counts = {name[:-1]: text.count(name) for name in COLLECTIVES if name in text}
    torch_xla.sync()
    worst = 0.0
    assert found.keys() == expected.keys(), name
    for key, y in expected.items():
        x = found[key].cpu()
        assert x.shape == y.shape and x.dtype == y.dtype, (name, key, x.shape, y.shape)
        assert bool(torch.isfinite(x).all()), (name, key)
        error = conformance.relative_error(x, y, floor=1.0)
        assert error < 1e-10, (name, key, error)
        worst = max(worst, error)
    assert "collective-permute" in counts or "all-gather" in counts, (name, counts)
    return f"{name}: {worst:.1e}, in the graph {counts}"


def main() -> None:
    torch.set_num_threads(1)
    xr.use_spmd()
    words = torch.tensor([123456789, 3987654321])
    arguments.dropout_seed = lambda p, device: words.to(device) if p else None  # type: ignore[assignment]
    count = xr.global_runtime_device_count()
    meshes = [xs.Mesh(np.arange(count), (count,), ("cp",))]
    if count % 2 == 0 and count > 2:
        meshes.append(xs.Mesh(np.arange(count), (2, count // 2), ("data", "cp")))
        meshes.append(xs.Mesh(np.arange(count), (count // 2, 2), ("cp", "data")))
    for given in sys.argv[1:]:
        if given in CASES:
            calls = [(given, CASES[given]())]
        else:
            first, many = map(int, given.split(":"))
            calls = [(repr(call), call) for call in (problems.make(i, largest=16) for i in range(first, first + many))]
        for i, (name, call) in enumerate(calls):
            print(check(name, call, meshes[(len(name) + i) % len(meshes)], marked=i % 2 == 0), flush=True)


if __name__ == "__main__":
    main()
