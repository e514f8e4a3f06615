"""Scores given in place of query and key: the same problem, on every engine and with every option."""

from __future__ import annotations

import math
from typing import Any

import problems
import pytest
import torch
from conformance import ENGINES, relative_error, weights
from marks import slow_after
from torch import Tensor

from torch_sinkhorn_attn import Dustbin, sinkhorn_attention, sinkhorn_plan

D = torch.float64


def scores_of(call: problems.Call) -> tuple[Tensor, dict[str, Any]]:
    """The products that the call's query and key come to, and its options without `scale`."""
    options = dict(call.options)
    scale = options.pop("scale", None)
    key = call.key.repeat_interleave(call.query.shape[-3] // call.key.shape[-3], -3)
    products = call.query @ key.mT * (1 / math.sqrt(call.query.shape[-1]) if scale is None else scale)
    return products.detach().requires_grad_(), options


def assert_same(call: problems.Call, engine: str) -> None:
    scores, options = scores_of(call)
    mask = call.mask
    try:
        sinkhorn_plan(call.query, call.key, mask, **{k: x for k, x in call.options.items() if k != "dropout_p"})
    except ValueError:  # a window that leaves a dustbin's problem no pair
        with pytest.raises(ValueError):
            sinkhorn_attention(scores, None, call.value, mask, engine=engine, **options)
        return
    added = torch.zeros_like(scores).requires_grad_()  # whose gradient is that of scores / epsilon
    float_mask = added if mask is None else added + mask if mask.dtype != torch.bool else None
    torch.manual_seed(call.seed)
    found = sinkhorn_attention(scores, None, call.value, mask, engine=engine, **options)
    if mask is None and options.get("is_causal"):
        float_mask = None
    torch.manual_seed(call.seed)
    truth = sinkhorn_attention(
        call.query, call.key, call.value, mask if float_mask is None else float_mask, engine=engine, **call.options
    )
    assert found.dtype == truth.dtype and relative_error(found, truth) < 1e-10, call
    if float_mask is not None:
        (grad,) = torch.autograd.grad((found * weights(found)).sum(), scores)
        (expected,) = torch.autograd.grad((truth * weights(truth)).sum(), added)
        assert relative_error(grad * options.get("epsilon", 1.0), expected) < 1e-9, call
    options.pop("dropout_p", None)
    plan = sinkhorn_plan(scores, attn_mask=mask, engine=engine, **options)
    given = {name: x for name, x in call.options.items() if name != "dropout_p"}
    assert relative_error(plan, sinkhorn_plan(call.query, call.key, mask, engine=engine, **given)) < 1e-10, call


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("start", slow_after(1, range(8000, 8100, 20)))
def test_they_are_the_products_of_the_tokens(start: int, engine: str) -> None:
    for seed in range(start, start + 20):
        assert_same(problems.make(seed), engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_scale_and_epsilon_apply(engine: str) -> None:
    scores = torch.randn(2, 3, 7, 9, dtype=D)
    found = sinkhorn_plan(scores, scale=0.7, epsilon=0.2, engine=engine)
    assert relative_error(found, sinkhorn_plan(scores * 3.5, engine=engine)) < 1e-12


@pytest.mark.parametrize("engine", ENGINES)
def test_a_matrix_alone(engine: str) -> None:
    scores, value = torch.randn(7, 9, dtype=D), torch.randn(9, 4, dtype=D)
    truth = sinkhorn_attention(scores[None], None, value[None], engine=engine)[0]
    found, aux = sinkhorn_attention(scores, None, value, engine=engine, return_aux=True)
    assert torch.equal(found, truth) and found.shape == (7, 4)
    assert aux.row_potential.shape == (7,) and aux.col_residual.shape == ()
    assert sinkhorn_plan(scores, dustbin=Dustbin(0.0, 0.0), engine=engine).shape == (8, 10)


@pytest.mark.parametrize("engine", ENGINES)
def test_minus_infinity_forbids_a_pair_and_low_scores_do_not(engine: str) -> None:
    scores = torch.randn(1, 6, 6, dtype=D)
    keep = torch.rand(1, 6, 6) > 0.2
    keep |= torch.eye(6, dtype=torch.bool)
    forbidden = scores.masked_fill(~keep, -torch.inf)
    truth = sinkhorn_plan(scores, attn_mask=keep, engine=engine)
    assert relative_error(sinkhorn_plan(forbidden, engine=engine), truth) < 1e-12
    assert (sinkhorn_plan(forbidden, engine=engine)[~keep] == 0).all()
    shifted = scores.clone()
    shifted[..., 2] -= 1e4  # a mask would make this key inactive; a score moves its potential
    assert relative_error(sinkhorn_plan(shifted, engine=engine), sinkhorn_plan(scores, engine=engine)) < 1e-9
    padded = torch.zeros(1, 6, 6, dtype=D)
    padded[..., 2] = -1e4
    found = sinkhorn_plan(scores, attn_mask=padded, engine=engine)
    assert (found[..., 2] == 0).all() and not (found.sum(-1) == 0).any()


def test_half_precision_is_solved_in_float32() -> None:
    for kind in (torch.float16, torch.bfloat16):
        scores = torch.randn(2, 5, 6).to(kind)
        truth = sinkhorn_plan(scores.double(), epsilon=0.3)
        found = sinkhorn_plan(scores, epsilon=0.3)
        assert found.dtype == kind and relative_error(found.double(), truth) < torch.finfo(kind).eps
        value = torch.randn(2, 6, 3).to(kind)
        assert sinkhorn_attention(scores.float(), None, value, epsilon=0.3).dtype == kind
    costs = torch.tensor([[0.0, 4.0], [4.0, 4.0]]) * 1e4  # scores, however low, are no mask
    found = sinkhorn_plan(-costs.half(), epsilon=2e4)
    assert relative_error(found.float(), sinkhorn_plan(-costs.half().float(), epsilon=2e4)) < 1e-3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sinkhorn_plan(scores.float()).dtype == torch.float32
        assert sinkhorn_attention(scores.float(), None, value.float()).dtype == torch.bfloat16


@pytest.mark.slow
def test_compiled_and_mapped() -> None:
    scores = torch.randn(3, 2, 6, 7, requires_grad=True)
    for options in ({"epsilon": 0.5}, {"window": (4, 4)}):
        compiled = torch.compile(lambda x, o=options: sinkhorn_plan(x, **o), fullgraph=True, backend="aot_eager")
        truth = sinkhorn_plan(scores, **options)
        assert relative_error(compiled(scores), truth) < 1e-6
        (grad,), (expected,) = (torch.autograd.grad(x.square().sum(), scores) for x in (compiled(scores), truth))
        assert relative_error(grad, expected) < 1e-5
        mapped = torch.vmap(lambda x, o=options: sinkhorn_plan(x, **o))(scores)
        assert relative_error(mapped, truth) < 1e-6


@pytest.mark.parametrize(
    ("query", "options", "words"),
    [
        (torch.zeros(2, 3, 4, 5, dtype=torch.int64), {}, "floating-point scores"),
        (torch.zeros(5), {}, r"\(L, S\)"),
        ([[1.0]], {}, "must be a tensor"),
        (torch.full((1, 3, 3), torch.nan), {}, "the scores .* hold NaN"),
        (torch.tensor([[1.0, torch.inf], [0.0, 0.0]]), {}, r"the scores .* hold \+inf"),
        (torch.tensor([[1.0, -torch.inf], [1.0, -torch.inf]]).tril(), {}, "plan"),
        (torch.zeros(1, 3, 3), {"attn_mask": torch.zeros(2, 2)}, "attn_mask has shape"),
        (torch.zeros(1, 3, 3), {"query_lengths": torch.tensor([1, 2])}, "query_lengths"),
    ],
)
def test_what_is_wrong_is_named(query: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        sinkhorn_plan(query, **options)


def test_a_value_that_does_not_belong_is_named() -> None:
    scores = torch.zeros(1, 3, 4)
    for value, words in (
        (torch.zeros(1, 5, 2), "tokens"),
        (torch.zeros(1, 4, 2, dtype=D), "float64"),
        (torch.zeros(1, 4, 2, dtype=torch.int32), "dtype"),
        (None, "value"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            sinkhorn_attention(scores, None, value)  # type: ignore[arg-type]
