"""Ops over a process group in a compiler, in this process alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from torch_sinkhorn_attn import Dustbin, sinkhorn_attention


@pytest.fixture
def group() -> Iterator[Any]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def test_numbers_may_change_between_calls_of_a_compiled_program(group: Any) -> None:
    """A compiler makes symbols of numbers that it has seen change."""

    def attention(*tokens: Tensor, epsilon: float, base_iters: int, score: float, tau: float, here: Any) -> Tensor:
        output = sinkhorn_attention(
            *tokens, epsilon=epsilon, base_iters=base_iters, dustbin=Dustbin(score, 0.0), relaxation=(None, tau),
            sequence_group=here,
        )  # fmt: skip
        assert isinstance(output, Tensor)
        return output

    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    tokens = torch.randn(3, 1, 2, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens.requires_grad_()
    for epsilon, base_iters, score, tau in [(1.0, 4, 0.5, 1.0), (0.5, 6, -2.0, 3.0), (0.7, 5, 0.1, float("inf"))]:
        numbers = {"epsilon": epsilon, "base_iters": base_iters, "score": score, "tau": tau}
        one, other = (f(*tokens, here=g, **numbers) for f, g in ((attention, None), (compiled, group)))
        assert torch.allclose(one, other, rtol=0, atol=1e-12)
        grads = [torch.autograd.grad(x.sin().sum(), tokens)[0] for x in (one, other)]
        assert torch.allclose(*grads, rtol=0, atol=1e-12)
