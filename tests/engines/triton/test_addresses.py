"""Tensors of more than 2^31 elements: views with huge strides, into memory that is promised and never there."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton_interpreter

from torch_sinkhorn_attn import sinkhorn_attention
from torch_sinkhorn_attn.engines import triton as engine

pytestmark = [
    pytest.mark.skipif(not engine.interpreted(), reason="the kernels run on the device here"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is not there until it is written to"),
]
triton_interpreter.quicken()
FAR, LINES = 2**31 + 64, 2**28  # elements between batch elements, and between lines: nine of them pass 2^31
NORESERVE = 0x4000


def spread(x: Tensor, *strides: int) -> Tensor:
    """The same tensor, its elements that far apart."""
    count = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    try:
        memory = mmap.mmap(-1, count * x.element_size(), flags=flags)
    except OSError:
        pytest.skip("this machine promises no memory that it has not got")
    far = torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, strides)
    return far.copy_(x)


@pytest.mark.parametrize("size", [12, pytest.param(140, marks=pytest.mark.slow)])
@pytest.mark.parametrize("which", ["lines", pytest.param("batch", marks=pytest.mark.slow)])
def test_offsets_are_64_bit(which: str, size: int) -> None:
    """For every tensor that a kernel reads with the caller's strides: forward, and the adjoint; resident and streaming
    kernels."""
    num, length = (2, 5) if which == "batch" else (1, 12)
    options = {"base_iters": 1, "tail_iters": 1, "engine": "triton"}
    query, key, value = (torch.randn(num, 1, n, 4, dtype=torch.float16) for n in (length, size, size))
    mask = torch.rand(num, 1, length, size) < 0.9
    mask[..., 0] = True

    def far(x: Tensor) -> Tensor:
        if which == "batch":
            return spread(x, FAR, x.shape[2] * x.shape[3], x.shape[3], 1)
        lines = min(LINES, 2**33 // x.shape[2])
        return spread(x, x.shape[2] * lines, x.shape[2] * lines, lines, 1)

    expected = sinkhorn_attention(*(near := [x.clone().requires_grad_() for x in (query, key, value)]), mask, **options)
    given = [far(x).requires_grad_() for x in (query, key, value)]
    found = sinkhorn_attention(*given, far(mask), **options)
    assert torch.equal(found, expected)
    grad = torch.randn_like(expected)
    for x, y in zip(torch.autograd.grad(found, given, grad), torch.autograd.grad(expected, near, grad), strict=True):
        assert torch.equal(x, y)
