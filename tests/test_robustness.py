"""Inputs nobody lists: overflow, garbage in padding, transforms, autocast, odd masks and shapes."""

from __future__ import annotations

import sys
from typing import Any

import conformance
import pytest
import torch
from conformance import relative_error
from torch import Tensor, nn

from torch_sinkhorn_attn import (
    Dustbin,
    SinkhornMultiheadAttention,
    certify,
    sinkhorn_attention,
    sinkhorn_plan,
)
from torch_sinkhorn_attn.engines.tiled.tiles import Tiles
from torch_sinkhorn_attn.method import staircase
from torch_sinkhorn_attn.problem.arguments import prepare
from torch_sinkhorn_attn.thermometer import exact

D = torch.float64
ENGINES = (*conformance.ENGINES, "reference")


def qkv(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=D).to(dtype).requires_grad_() for _ in range(3)]


def gradients(inputs: list[Tensor], *args: Any, **options: Any) -> list[Tensor]:
    out = sinkhorn_attention(*inputs, *args, **options)
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), inputs)]


# Factors whose exponentials leave the dtype's range


@pytest.mark.parametrize("relaxation", [1.0, (None, 1.0), (0.3, 0.3)])
@pytest.mark.parametrize("low", [-200.0, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_relaxed_columns_far_below_the_others(relaxation: Any, low: float, dtype: torch.dtype) -> None:
    mask = torch.zeros(1, 8, dtype=dtype)
    mask[:, 6:] = low
    inputs = qkv(1, 2, 8, 8, dtype=dtype)
    *found, truth = (gradients(inputs, mask, relaxation=relaxation, engine=e) for e in ENGINES)
    for x, y in ((x, y) for one in found for x, y in zip(one, truth, strict=True)):
        assert torch.isfinite(x).all()
        assert relative_error(x, y) < (1e-11 if dtype == D else 3e-4)


@pytest.mark.parametrize("options", [{}, {"dustbin": Dustbin(-300.0, 200.0)}, {"window": (5, 5)}])
@pytest.mark.parametrize("iters", [(0, 2), (1, 3)])
def test_duals_that_jump_between_tail_iterations(options: dict, iters: tuple[int, int]) -> None:
    q, k, v = qkv(1, 2, 8, 8, dtype=D)
    inputs = [(20 * q).detach().requires_grad_(), (20 * k).detach().requires_grad_(), v]
    options = options | {"base_iters": iters[0], "tail_iters": iters[1]}
    *found, truth = (gradients(inputs, engine=e, **options) for e in ENGINES)
    for x, y in ((x, y) for one in found for x, y in zip(one, truth, strict=True)):
        assert torch.isfinite(x).all() and (x - y).norm() < 1e-10


def test_factors_entry_by_entry_equal_scaled_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerators always do, and CPUs beside large differences."""
    inputs = qkv(2, 2, 9, 4, dtype=D)
    for options in ({}, {"dustbin": Dustbin(0.2, 0.1)}, {"tail_iters": 0}, {"relaxation": 1.0, "tail_iters": 3}):
        scaled = gradients(inputs, engine="tiled", **options)
        with monkeypatch.context() as patch:
            patch.setattr(staircase, "LARGEST_EXPONENT", {D: -1.0})
            entry_by_entry = gradients(inputs, engine="tiled", **options)
        for x, y in zip(scaled, entry_by_entry, strict=True):
            assert torch.allclose(x, y, atol=1e-13)


# Inactive tokens may hold anything


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", ["lengths", "segments", "mask"])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_garbage_in_inactive_tokens_does_not_spread(engine: str, how: str, garbage: float) -> None:
    active = torch.tensor([[True] * 8, [True] * 5 + [False] * 3])
    ids = active.long() - 1
    mask = (active[:, :, None] & active[:, None])[:, None]
    args, options = {
        "lengths": ((), {"query_lengths": active.sum(-1), "key_lengths": active.sum(-1)}),
        "segments": ((), {"query_segment_ids": ids, "key_segment_ids": ids}),
        "mask": ((mask,), {}),
    }[how]
    clean = qkv(2, 2, 8, 8)
    dirty = [x.detach().masked_fill(~active[:, None, :, None], garbage).requires_grad_() for x in clean]
    for x, y in zip(
        gradients(dirty, *args, engine=engine, **options),
        gradients(clean, *args, engine=engine, **options),
        strict=True,
    ):
        assert torch.equal(x, y)


# Transforms of torch


COMPILED: dict[str, dict[str, Any]] = {
    "mask": {"attn_mask": torch.ones(8, 8, dtype=torch.bool)},
    "lengths": {"query_lengths": torch.tensor([5]), "key_lengths": torch.tensor([4])},
    "mass": {"row_mass": torch.ones(8)},
    "dustbin": {"dustbin": Dustbin(torch.zeros(2, 1), 0.0)},
    "segments": {f"{x}_segment_ids": torch.zeros(1, 8, dtype=torch.int64) for x in ("query", "key")},
    "implicit": {"gradient": "implicit"},
    "dropout": {"dropout_p": 0.1, "relaxation": 1.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_fully_with_every_option(name: str) -> None:
    torch._dynamo.reset()
    inputs = qkv(1, 2, 8, 8)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sinkhorn_attention(q, k, v, **COMPILED[name])

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        out = compiled(*inputs)
    if name != "dropout":
        assert torch.allclose(out, function(*inputs), atol=1e-6)
        found, truth = (torch.autograd.grad(f(*inputs).sin().sum(), inputs[0])[0] for f in (compiled, function))
        assert torch.allclose(found, truth, atol=1e-6)


def test_functorch_transforms() -> None:
    q, k, v = (x.detach() for x in qkv(3, 2, 8, 4, dtype=D))
    assert torch.allclose(torch.func.vmap(sinkhorn_attention)(q, k, v), sinkhorn_attention(q, k, v))
    shared = torch.func.vmap(sinkhorn_attention, in_dims=(0, None, None))(q, k[0], v[0])
    assert torch.allclose(shared, sinkhorn_attention(q, *(x[:1].expand(3, -1, -1, -1) for x in (k, v))))
    assert torch.allclose(torch.func.vmap(sinkhorn_plan)(q, k), sinkhorn_plan(q, k))
    pairs, mask = q.expand(4, 3, 2, 8, 4), torch.randn(4, 8, 8, dtype=D)
    masked = torch.func.vmap(sinkhorn_attention)(pairs, pairs, pairs, mask)
    assert torch.allclose(masked, sinkhorn_attention(pairs, pairs, pairs, mask[:, None, None]))

    def loss(q: Tensor) -> Tensor:
        return sinkhorn_attention(q, k, v, dustbin=Dustbin(0.1, 0.0)).sin().sum()

    leaf = q.clone().requires_grad_()
    (truth,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.allclose(torch.func.grad(loss)(q), truth)
    jacobian = torch.func.jacrev(lambda q: sinkhorn_attention(q, k[0], v[0]))(q[0])
    assert jacobian.shape == (2, 8, 4, 2, 8, 4)


def test_autocast_stays_out_of_the_op() -> None:
    half = [x.detach().bfloat16() for x in qkv(1, 2, 64, 16)]
    for engine in ENGINES:
        plain = sinkhorn_attention(*half, return_aux=True, engine=engine)[1]
        with torch.autocast("cpu", torch.bfloat16):
            cast = sinkhorn_attention(*half, return_aux=True, engine=engine)[1]
        assert torch.equal(plain.row_potential, cast.row_potential)
    inputs = qkv(1, 2, 16, 16)
    truth = gradients(inputs)[1]
    out = sinkhorn_attention(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(out, inputs[0], out.cos().detach())[0]
    assert torch.allclose(found, truth, atol=1e-6)
    for engine in (*ENGINES, "reference"):  # backward within it too
        half[0].requires_grad_()
        out = sinkhorn_attention(*half, gradient="implicit", engine=engine)
        truth = torch.autograd.grad(out, half[0], out.float().cos().to(out.dtype).detach(), retain_graph=True)[0]
        with torch.autocast("cpu", torch.bfloat16):
            found = torch.autograd.grad(out, half[0], out.float().cos().to(out.dtype).detach())[0]
        assert (found - truth).norm() < 0.1 * truth.norm()


def test_meta_tensors_give_shapes() -> None:
    x = torch.empty(2, 4, 8, 16, device="meta")
    assert sinkhorn_attention(x, x, x, torch.empty(8, 8, device="meta"), window=(2, 2)).shape == x.shape
    module = SinkhornMultiheadAttention(16, 4, dustbin=True, batch_first=True, device="meta")
    tokens = torch.empty(2, 5, 16, device="meta")
    assert module(tokens, tokens, tokens)[0].shape == tokens.shape


# Masks and windows


def test_windows_far_beyond_the_sequence_are_full() -> None:
    inputs = qkv(1, 2, 8, 8)
    for side in (100, 2**31, 2**59, sys.maxsize, 2**70):
        assert torch.equal(sinkhorn_attention(*inputs, window=(side, side)), sinkhorn_attention(*inputs))


def test_masks_that_swallow_scores_are_refused_unless_softmax() -> None:
    inputs = qkv(1, 2, 8, 8)
    mask = torch.zeros(8)
    mask[6:] = -1e9
    with pytest.raises(ValueError, match=r"attn_mask holds -1e\+09.*the score is lost in it.*Use -inf"):
        sinkhorn_attention(*inputs, mask, mask_floor=None)
    forbidden = sinkhorn_attention(*inputs, mask.masked_fill(mask < 0, -torch.inf))
    assert torch.equal(sinkhorn_attention(*inputs, mask), forbidden)  # whole keys: padding
    softmax = sinkhorn_attention(*inputs, mask, base_iters=0, tail_iters=0)
    assert torch.allclose(softmax, nn.functional.scaled_dot_product_attention(*inputs, mask[None]), atol=1e-6)
    sinkhorn_attention(*inputs, mask.clamp(min=-1e4))
    sinkhorn_attention(*(x.double() for x in inputs), mask.double())  # float64 holds both


def test_softmax_mode_is_exact_for_large_scores() -> None:
    """The rounding of a large score cancels in a balanced row, as in softmax."""
    q, k, v = qkv(1, 2, 16, 8)
    truth = nn.functional.scaled_dot_product_attention(q.double() * 100, k.double(), v.double())
    softmax = nn.functional.scaled_dot_product_attention(q * 100, k, v)
    found = sinkhorn_attention(q * 100, k, v, base_iters=0, tail_iters=0)
    assert (found - truth).abs().max() < 2 * (softmax - truth).abs().max() + 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_forbidden_means_forbidden_in_both_dtypes(engine: str) -> None:
    """finfo.min / 2 of the mask's dtype or of the scores', whichever is nearer."""
    inputs = qkv(1, 2, 8, 8)
    keep = torch.ones(8, 8, dtype=torch.bool)
    keep[:, 6:] = False
    truth = sinkhorn_attention(*inputs, keep, engine=engine)
    for dtype, low in (
        (D, torch.finfo(torch.float32).min),
        (D, -1e300),
        (torch.float16, torch.finfo(torch.float16).min),
    ):
        mask = torch.zeros(8, 8, dtype=dtype).masked_fill(~keep, low)
        assert torch.equal(sinkhorn_attention(*inputs, mask, engine=engine), truth)


def test_module_keeps_half_masks_forbidden_beside_float_padding() -> None:
    module = SinkhornMultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 6, 8)
    forbid = torch.zeros(6, 6, dtype=torch.bool)
    forbid[:, 5] = True
    low = torch.zeros(6, 6, dtype=torch.float16).masked_fill(forbid, torch.finfo(torch.float16).min)
    padding = torch.full((2, 6), 0.25)
    truth = module(x, x, x, attn_mask=forbid, key_padding_mask=padding)[0]
    assert torch.equal(module(x, x, x, attn_mask=low, key_padding_mask=padding)[0], truth)


def test_antitriangular_masks_are_refused_too() -> None:
    q, k, _ = qkv(1, 8, 4)
    with pytest.raises(ValueError, match=r"no balanced plan.*force a block"):
        sinkhorn_plan(q, k, torch.ones(8, 8, dtype=torch.bool).tril().flip(-1))


def test_ids_beyond_the_lengths_are_not_judged() -> None:
    inputs = qkv(1, 2, 6, 4)
    ids, length = torch.tensor([[0, 0, 1, 1, 0, 0]]), torch.tensor([4])
    options = {"query_segment_ids": ids, "key_segment_ids": ids, "query_lengths": length, "key_lengths": length}
    found = sinkhorn_attention(*inputs, **options)
    clean = torch.tensor([[0, 0, 1, 1, -1, -1]])
    assert torch.equal(found, sinkhorn_attention(*inputs, query_segment_ids=clean, key_segment_ids=clean))


# Shapes


@pytest.mark.parametrize("engine", ENGINES)
def test_empty_axes(engine: str) -> None:
    q = torch.randn(2, 1, 4, 3)
    no_keys = torch.randn(2, 1, 0, 3)
    assert (sinkhorn_attention(q, no_keys, no_keys, torch.zeros(4, 0), engine=engine) == 0).all()
    assert sinkhorn_attention(q, q, torch.randn(2, 1, 4, 0), engine=engine).shape == (2, 1, 4, 0)
    assert certify(torch.randn(1, 0, 3), torch.randn(1, 4, 3), engine=engine).rate.tolist() == [0.0]
    for num, length, size in ((0, 3, 3), (2, 0, 3), (2, 3, 0), (2, 0, 0)):
        q, k = torch.randn(num, 1, length, 3), torch.randn(num, 1, size, 3)
        for mask in (torch.zeros(length, size), torch.zeros(1, size), torch.zeros(length, 1), torch.ones(length, size)):
            for kind in (torch.float32, torch.bool):
                out, aux = sinkhorn_attention(q, k, k, mask.to(kind), engine=engine, window=(1, 1), return_aux=True)
                assert out.shape == q.shape and not out.any() and "no plan" not in aux.verdict()
    q, no_keys = torch.randn(2, 1, 4, 3), torch.randn(2, 1, 0, 3)
    with pytest.raises(ValueError, match="at least one head"):
        sinkhorn_attention(torch.randn(2, 0, 4, 3), q[:, :0], q[:, :0], engine=engine)


# Certificates


def test_one_zero_among_many_pairs_is_seen_in_float32() -> None:
    n = 4100  # n^2 > 2^24
    q, k = torch.randn(1, n, 2) * 0.1, torch.randn(1, n, 2) * 0.1
    mask = torch.ones(n, n, dtype=torch.bool)
    for missing in (False, True):
        mask[5, 7] = not missing
        prepared = prepare(q, k, None, mask)
        zero = torch.zeros(1, 1, n)
        tiles = Tiles(prepared.inputs, prepared.problem).at(zero, zero)
        positive, _ = exact._log_plan_spread(tiles, exact.ByProblem(tiles))
        assert positive.item() == (not missing)


def test_the_implicit_gradient_certifies_nothing_about_the_unrolled_one() -> None:
    q, k, _ = qkv(1, 6, 4, dtype=D)
    c = certify(q, k, gradient="implicit", base_iters=1)
    assert c.bias_bound.isinf().all() and (c.implicit_bias_bound == 0).all()


# The module


def test_parameters_can_be_drawn_again_after_to_empty() -> None:
    for options in ({}, {"kdim": 3, "vdim": 5}, {"add_bias_kv": True, "dustbin": True}):
        torch.manual_seed(0)
        truth = SinkhornMultiheadAttention(8, 2, **options)
        meta = SinkhornMultiheadAttention(8, 2, device="meta", **options).to_empty(device="cpu")
        for p in meta.parameters():
            nn.init.constant_(p, torch.nan)
        torch.manual_seed(0)
        nn.Linear(8, 8)  # the constructor draws out_proj first
        meta._reset_parameters()
        assert torch.equal(
            truth.in_proj_weight if truth.in_proj_weight is not None else truth.q_proj_weight,
            meta.in_proj_weight if meta.in_proj_weight is not None else meta.q_proj_weight,
        )
        assert meta.dustbin_row_score is None or (meta.dustbin_row_score == 0).all()


@pytest.mark.parametrize("padding", [False, True])
def test_a_softmax_window_does_not_hide_the_extra_keys(padding: bool) -> None:
    options = {"add_zero_attn": True, "batch_first": True, "dtype": D}
    module = SinkhornMultiheadAttention(8, 2, window=(1, 1), base_iters=0, tail_iters=0, **options)
    theirs = nn.MultiheadAttention(8, 2, **options)
    theirs.load_state_dict(module.state_dict())
    x = torch.randn(2, 5, 8, dtype=D)
    ignore = torch.tensor([[False] * 5, [False] * 4 + [True]]) if padding else None
    far = (torch.arange(5)[:, None] - torch.arange(5)).abs() > 1
    found, weights = module(x, x, x, key_padding_mask=ignore)
    if not padding:
        truth, their_weights = theirs(x, x, x, attn_mask=far)
        assert torch.allclose(found, truth, atol=1e-12) and torch.allclose(weights, their_weights, atol=1e-12)
    assert (weights[..., -1] > 0).all() and (weights[:, :, :5][:, far] == 0).all()


def test_module_options_are_checked_at_construction() -> None:
    for options, message in (
        ({"epsilon": -1.0}, "epsilon=-1.0"),
        ({"window": (1, 2, 3)}, "window"),
        ({"base_iters": -3}, "base_iters=-3"),
        ({"gradient": "foo"}, "gradient='foo'"),
        ({"engine": 3}, "engine must be"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            SinkhornMultiheadAttention(16, 4, **options)


def test_tiny_epsilon_that_overflows_is_refused() -> None:
    with pytest.raises(ValueError, match="epsilon=1e-42 is too small"):
        sinkhorn_attention(*qkv(1, 2, 8, 8), epsilon=1e-42)
