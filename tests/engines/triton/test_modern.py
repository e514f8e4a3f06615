"""torch.compile, vmap, autocast, DDP and FSDP2 around the GPU engine, interpreted: its ops are those of all engines."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")
import triton_interpreter

from torch_sinkhorn_attn import SinkhornMultiheadAttention, sinkhorn_attention
from torch_sinkhorn_attn.engines import triton as engine

pytestmark = pytest.mark.skipif(not engine.interpreted(), reason="the kernels run on the device here")
triton_interpreter.quicken()
OPTIONS: dict[str, Any] = {"base_iters": 1, "tail_iters": 1, "engine": "triton"}


def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    out = sinkhorn_attention(query, key, value, **OPTIONS | options)
    assert isinstance(out, Tensor)
    return out


def inputs(*batch: int, length: int = 6, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(*batch, 2, length, 4, dtype=dtype, requires_grad=True) for _ in range(3)]


@pytest.mark.slow
def test_one_graph_computes_the_same() -> None:
    x = inputs(1)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    expected, found = attend(*x), compiled(*x)
    assert torch.equal(found, expected)
    for a, b in zip(
        torch.autograd.grad(found.sin().sum(), x), torch.autograd.grad(expected.sin().sum(), x), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_vmap_is_a_batch() -> None:
    x = [t.detach() for t in inputs(2, 1)]
    torch.testing.assert_close(torch.vmap(attend)(*x), torch.stack([attend(*each) for each in zip(*x, strict=True)]))


def test_autocast_stays_out_of_the_op() -> None:
    x = inputs(1, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sinkhorn_attention(*x, return_aux=True, **OPTIONS)[1]
    assert torch.equal(found.row_potential, sinkhorn_attention(*x, return_aux=True, **OPTIONS)[1].row_potential)


@pytest.fixture
def group() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_wrapped_module_trains_as_a_plain_one(kind: str, group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain = SinkhornMultiheadAttention(8, 2, batch_first=True, **OPTIONS)
    wrapped: nn.Module = copy.deepcopy(plain)
    wrapped = nn.parallel.DistributedDataParallel(wrapped) if kind == "ddp" else wrapped
    if kind == "fsdp":
        fully_shard(wrapped, mesh=init_device_mesh("cpu", (1,)))
    x = torch.randn(1, 5, 8)
    losses: list[list[float]] = [[], []]
    for model, found in zip((plain, wrapped), losses, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(2):
            loss = model(x, x, x, need_weights=False)[0].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0][0] != losses[0][1]
