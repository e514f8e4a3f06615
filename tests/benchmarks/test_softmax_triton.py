"""The benchmarks' own softmax kernels compute softmax attention and its derivative, by triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
SHAPES = {"forward": (32, 32, 4, 1), "dq": (32, 32, 4, 1), "dkv": (32, 32, 4, 1)}


@interpreted
@pytest.mark.parametrize(("length", "size"), [(32, 64), (37, 50)])
def test_softmax_kernels_equal_sdpa(length: int, size: int) -> None:
    from benchmarks.lib import softmax_triton

    query, key, value = (torch.randn(1, 2, n, 16, requires_grad=True) for n in (length, size, size))
    expected = F.scaled_dot_product_attention(query, key, value)
    grad = torch.randn_like(expected)
    inputs = (query.detach(), key.detach(), value.detach())
    output, log_sum = softmax_triton.forward(*inputs, SHAPES)
    torch.testing.assert_close(output, expected.detach(), rtol=1e-5, atol=1e-5)
    found = softmax_triton.backward(inputs, output, log_sum, grad, SHAPES)
    for x, y in zip(found, torch.autograd.grad(expected, (query, key, value), grad), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
