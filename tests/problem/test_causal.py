"""The call of torch.nn.functional.scaled_dot_product_attention: its positions, and is_causal as it defines it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance import ENGINES
from marks import slow_after
from torch import Tensor

from torch_sinkhorn_attn import Dustbin, certify, sinkhorn_attention, sinkhorn_plan

D = torch.float64
SIZES = (1, 2, 5, 70)
OPTIONS: list[dict[str, Any]] = [
    {"dustbin": Dustbin(0.1, 0.2)},
    {"relaxation": 1.0},
    {"relaxation": (None, 2.0)},
    {"relaxation": (2.0, None)},
    {"relaxation": 1.0, "window": (3, 2)},
    {"base_iters": 0, "tail_iters": 0, "window": (2, -1)},
    {},
]


def tokens(length: int, size: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, n, 4, generator=g, dtype=D) for n in (length, size, size)]


@pytest.mark.parametrize("engine", [*ENGINES, "reference"])
def test_softmax_mode_is_scaled_dot_product_attention(engine: str) -> None:
    """Called with the same positional arguments, for fewer, as many and more queries than keys."""
    for length, size in itertools.product(SIZES, SIZES):
        q, k, v = tokens(length, size)
        truth = F.scaled_dot_product_attention(q, k, v, None, 0.0, True)
        found = sinkhorn_attention(q, k, v, None, 0.0, True, base_iters=0, tail_iters=0, engine=engine)
        assert torch.allclose(found, truth, atol=1e-12)
    q, k, v = tokens(4, 6)
    mask = torch.ones(4, 6, dtype=torch.bool).triu()
    truth = F.scaled_dot_product_attention(q, k, v, mask, 0.0, False, scale=0.3, enable_gqa=True)
    options = {"base_iters": 0, "tail_iters": 0, "engine": engine, "scale": 0.3, "enable_gqa": True}
    assert torch.allclose(sinkhorn_attention(q, k, v, mask, 0.0, False, **options), truth, atol=1e-12)
    torch.manual_seed(0)
    dropped = sinkhorn_attention(q, k, v, mask, 0.5, engine=engine)
    torch.manual_seed(0)
    assert torch.equal(dropped, sinkhorn_attention(q, k, v, mask, dropout_p=0.5, engine=engine))
    assert not torch.allclose(dropped, sinkhorn_attention(q, k, v, mask, engine=engine))


@pytest.mark.slow
@pytest.mark.parametrize("options", slow_after(2, OPTIONS), ids=str)
def test_causal_is_the_lower_triangle_as_a_mask(options: dict[str, Any]) -> None:
    """The plan, its output and gradient, or a refusal by both, whatever the engine."""
    for length, size in itertools.product(SIZES, SIZES):
        q, k, v = tokens(length, size)
        q.requires_grad_()
        mask = torch.ones(length, size, dtype=torch.bool).tril()
        try:
            truth = sinkhorn_attention(q, k, v, mask, engine="reference", **options)
        except ValueError:
            truth = None
        for engine in (*ENGINES, "reference"):
            if truth is None:
                with pytest.raises(ValueError, match="is_causal=True"):
                    sinkhorn_attention(q, k, v, is_causal=True, engine=engine, **options)
                continue
            found = sinkhorn_attention(q, k, v, is_causal=True, engine=engine, **options)
            assert torch.allclose(found, truth, atol=1e-10)
            grads = [torch.autograd.grad(x.sin().sum(), q, retain_graph=True)[0] for x in (found, truth)]
            assert torch.allclose(*grads, atol=1e-10)


def test_balanced_causal_needs_more_queries_than_keys() -> None:
    for length, size in ((2, 2), (5, 5), (2, 9)):
        with pytest.raises(ValueError, match=r"is the identity .* Give it a dustbin or relaxation=tau, or use base"):
            sinkhorn_attention(*tokens(length, size), is_causal=True)
    plan = sinkhorn_plan(*tokens(6, 2)[:2], is_causal=True, base_iters=400)
    assert torch.allclose(plan.sum(-2), torch.tensor(3.0, dtype=D)) and (plan[..., 0, 1] == 0).all()
    assert torch.allclose(sinkhorn_plan(*tokens(1, 1)[:2], is_causal=True), torch.ones(2, 3, 1, 1, dtype=D))
    diagonal = sinkhorn_plan(*tokens(5, 5)[:2], is_causal=True, window=(0, 0))
    assert torch.allclose(diagonal, torch.eye(5, dtype=D).expand(2, 3, 5, 5))


def test_other_arguments_of_the_call() -> None:
    q, k, v = tokens(4, 4)
    with pytest.raises(ValueError, match=r"attn_mask and is_causal=True exclude each other"):
        sinkhorn_attention(q, k, v, torch.ones(4, 4, dtype=torch.bool), is_causal=True, relaxation=1.0)
    with pytest.raises(TypeError, match=r"is_causal must be True or False, got 1"):
        sinkhorn_attention(q, k, v, is_causal=1)  # type: ignore[arg-type]
    assert torch.equal(sinkhorn_attention(q, k, v, is_causal=False), sinkhorn_attention(q, k, v))
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    found, truth = certify(q, k, is_causal=True, relaxation=1.0), certify(q, k, mask, relaxation=1.0)
    assert torch.allclose(found.rate, truth.rate) and torch.allclose(found.measured_bias, truth.measured_bias)


@pytest.mark.parametrize("engine", [*ENGINES, "reference"])
def test_packed_causal_problems_equal_separate_ones(engine: str) -> None:
    """Counted from the first token of each segment, inactive ones left out; lengths likewise."""
    rows = torch.tensor([-1, 0, 0, 0, -1, 1, 1, -1, 1])
    cols = torch.tensor([0, 0, -1, 0, 1, 1, 1, 1, 1, 1])
    q, k, v = tokens(9, 10)
    found = sinkhorn_attention(
        q, k, v, is_causal=True, relaxation=1.0, engine=engine,
        query_segment_ids=rows.expand(2, -1), key_segment_ids=cols.expand(2, -1),
    )  # fmt: skip
    for segment in (0, 1):
        own, other = (rows == segment).nonzero()[:, 0], (cols == segment).nonzero()[:, 0]
        parts = q[:, :, own], k[:, :, other], v[:, :, other]
        truth = sinkhorn_attention(*parts, is_causal=True, relaxation=1.0, engine="reference")
        assert torch.allclose(found[:, :, own], truth, atol=1e-10)
    lengths = {"query_lengths": torch.tensor([9, 4]), "key_lengths": torch.tensor([6, 7])}
    found = sinkhorn_attention(q, k, v, is_causal=True, relaxation=1.0, engine=engine, **lengths)
    for n, (length, size) in enumerate(((9, 6), (4, 7))):
        parts = q[n, :, :length], k[n, :, :size], v[n, :, :size]
        truth = sinkhorn_attention(*parts, is_causal=True, relaxation=1.0, engine="reference")
        assert torch.allclose(found[n, :, :length], truth, atol=1e-10)
        assert (found[n, :, length:] == 0).all()


@pytest.mark.slow
def test_causal_compiles() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sinkhorn_attention(q, k, v, is_causal=True, dustbin=Dustbin(0.1, 0.2))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    q, k, v = tokens(5, 7)
    assert torch.allclose(compiled(q, k, v), function(q, k, v), atol=1e-10)
