"""torch's half of the array functions."""

from __future__ import annotations

import pytest
import torch

from torch_sinkhorn_attn.arrays.of_torch import add_at, add_in_order


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (2, 0, 7), (2, 3, 0)])
def test_adding_in_order_is_adding(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    index = torch.randint(0, 4, shape[-1:])
    found, truth = (f(x, index, 4) for f in (add_in_order, add_at))
    assert found.shape == truth.shape and torch.allclose(found, truth, rtol=1e-14)
    weight = torch.randn_like(truth)
    assert torch.equal(*(torch.autograd.grad(y, x, weight)[0] for y in (found, truth)))


def test_an_index_of_its_own_for_each_line() -> None:
    x, index = torch.arange(6.0).view(2, 3), torch.tensor([[0, 0, 1], [1, 1, 1]])
    assert torch.equal(add_in_order(x, index, 2), torch.tensor([[1.0, 2.0], [0.0, 12.0]]))
