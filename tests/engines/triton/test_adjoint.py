"""The streaming adjoint against the definition, interpreted on CPU tensors: in float64 to 1e-10, whatever the options.

The forward is the tiled engine's, which the interpreter has no part in; `test_streaming.py` has both together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import problems
import pytest
import torch
from conformance import assert_agrees, relative_error, results, weights
from marks import slow_after

pytest.importorskip("triton")
import triton_interpreter

from torch_sinkhorn_attn import Dustbin, sinkhorn_attention, sinkhorn_plan
from torch_sinkhorn_attn.engines import triton as engine
from torch_sinkhorn_attn.engines.tiled.engine import ENGINE as tiled
from torch_sinkhorn_attn.engines.triton import choice, layout
from torch_sinkhorn_attn.engines.triton.streaming import adjoint, adjoint_vectors, blocks, mask_gradient, run

pytestmark = pytest.mark.skipif(not engine.interpreted(), reason="the kernels run on the device here")
triton_interpreter.quicken()
CHUNK = 5
MOST = 8  # launches times heads of a problem's backward, roughly: what the interpreter does in a second


@pytest.fixture(autouse=True)
def backward_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the backward is interpreted, and always streams."""
    both = SimpleNamespace(solve=tiled.solve, forward=tiled.forward, backward=run.backward)
    monkeypatch.setattr(choice, "kernels", lambda *args, **options: both)
    monkeypatch.setattr(engine.TritonEngine, "plan", lambda self, *args, **options: tiled.plan(*args, **options))


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What was decided on the device: which heads have their exponentials outside of the plan."""
    seen: list[torch.Tensor] = []

    def prepared(*args: Any) -> adjoint_vectors.Prepared:
        found = adjoint_vectors.prepared(*args)
        if found.entrywise is not None:
            seen.append(found.flags)
        return found

    monkeypatch.setattr(adjoint, "prepared", prepared)
    return seen


def small_tiles(monkeypatch: pytest.MonkeyPatch, outer: int, inner: int) -> None:
    monkeypatch.setattr(blocks, "OVERRIDE", blocks.Blocks(outer, inner, 4, 1))


def call_of(seed: int, *shape: int, dtype: torch.dtype = torch.float64, **options: Any) -> problems.Call:
    """A problem `(N, H, Hk, L, S, E)`."""
    g = torch.Generator().manual_seed(seed)
    num, heads, key_heads, length, size, width = shape
    shapes = (heads, length, width), (key_heads, size, width), (key_heads, size, width + 1)
    leaves = [torch.randn(num, *x, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for x in shapes]
    mask = options.pop("mask", None)
    if mask is not None:
        mask = torch.randn(mask, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        leaves.append(mask)
    options = {"base_iters": 2, "enable_gqa": heads != key_heads, **options}
    return problems.Call(seed, *leaves[:3], mask, options, leaves)


def cheap(start: int, count: int) -> Iterator[problems.Call]:
    """`count` problems of few heads, from the first seed `start * 1000` on."""
    seed = start * 1000
    while count:
        call = problems.make(seed)
        heads, tail = call.query.shape[:-2].numel(), call.options["tail_iters"]
        seed += 1
        if heads * (tail + 1) <= MOST and call.options["gradient"] != "implicit":
            count -= 1
            yield call


@pytest.mark.parametrize("chunk", slow_after(1, range(40), exhaustive=range(2, 40)))
def test_random_problems(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of few lines in every other chunk, so that several are walked."""
    if chunk % 2:
        small_tiles(monkeypatch, 4, 8)
    refused = 0
    for call in cheap(chunk, CHUNK):
        try:
            assert_agrees(call, "triton", plan=chunk % 4 == 2)
        except ValueError:  # a drawn window may leave no pair at all
            refused += 1
    assert refused <= 1


TAILS: dict[str, dict[str, Any]] = {
    "two": {"tail_iters": 2, "dustbin": Dustbin(0.3, torch.tensor(0.1, dtype=torch.float64), value=torch.ones(4))},
    "none": {"tail_iters": 0},
    "softmax": {"base_iters": 0, "tail_iters": 0},
    "one": {"tail_iters": 1, "relaxation": 1.5},
    "three": {"tail_iters": 3},
    "implicit": {"gradient": "implicit", "base_iters": 8},
    "more terms than are unrolled": {"gradient": "unrolled", "base_iters": 3},
    "dropped out": {"dropout_p": 0.4, "tail_iters": 1},
    "relaxed, none": {"tail_iters": 0, "relaxation": (0.7, None)},
}


@pytest.mark.parametrize("name", slow_after(1, TAILS))
def test_tails_over_many_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that share a key head, and lines that fill no block."""
    small_tiles(monkeypatch, 16, 8)
    if name == "implicit":
        monkeypatch.setattr("torch_sinkhorn_attn.method.implicit.MAX_ITERS", 12)
        call = call_of(1, 1, 1, 1, 9, 7, 3, epsilon=3.0, **TAILS[name])
    else:
        call = call_of(1, 1, 2, 1, 21, 19, 3, **TAILS[name])
    assert_agrees(call, "triton", plan=False)


MASKS = [(2, 1, 1, 9), (1, 2, 11, 9)]
MASKS += [x for x in itertools.product((1, 2), (1, 2), (1, 11), (1, 9)) if x not in MASKS]


@pytest.mark.parametrize("shape", slow_after(1, MASKS, exhaustive=MASKS[1::2]))
def test_every_broadcast_of_a_float_mask(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, 8, 8)
    monkeypatch.setattr(mask_gradient, "PROGRAMS", 5)  # two parts or more, and parts of several tiles
    assert_agrees(call_of(2, 2, 2, 2, 11, 9, 2, mask=shape, base_iters=1, tail_iters=0), "triton", plan=False)


# A relaxed side forgets by and by how high the potentials began: balanced, their differences would stay small.
EXTREME: list[dict[str, Any]] = [
    {"relaxation": 1.5},
    {"relaxation": (None, 2.0), "window": (8, 8)},
    {"relaxation": (1.0, None), "dustbin": Dustbin(0.0, 1.0)},
    {"relaxation": 1.0, "mask": (20,)},
]


@pytest.mark.parametrize("size", slow_after(1, [100.0, 1.0]))
@pytest.mark.parametrize("options", slow_after(1, EXTREME))
def test_exponents_beyond_the_safe_range(size: float, options: dict[str, Any], flags: list[torch.Tensor]) -> None:
    """One head's tail starts from potentials far away, whose differences no type's exponents reach: the device tells,
    head by head."""
    bins = int("dustbin" in options)
    options = {"base_iters": 0, **options}
    start = torch.linspace(1, 2, 20 + bins, dtype=torch.float64).repeat(1, 2, 1)
    start[:, 1] *= size
    doubles, singles = (
        call_of(3, 1, 2, 2, 20, 20, 6, dtype=dtype, initial_potentials=(start.to(dtype), -start.to(dtype)), **options)
        for dtype in (torch.float64, torch.float32)
    )
    truth, plain = (results(call, "reference", plan=False) for call in (doubles, singles))
    found = results(singles, "triton", plan=False)
    assert all(x[0, 0] == 1 for x in flags) and flags[-1][0].tolist() == [1, int(size == 1)]
    for name, y in truth.items():
        assert torch.isfinite(found[name]).all()
        if "gradient" in name:
            allowed = 3 * relative_error(plain[name].double(), y) + 2e-6
            assert relative_error(found[name].double(), y) <= allowed, name


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_float32_is_as_exact_as_plain_float32_pytorch(seed: int) -> None:
    options: dict[str, Any] = (
        {"tail_iters": 1 + seed % 2, "window": (9, 9)} if seed % 3 else {"dustbin": Dustbin(0.0, 0.5)}
    )
    double, single = (call_of(seed, 1, 1, 1, 20, 20, 6, dtype=t, **options) for t in (torch.float64, torch.float32))
    truth = results(double, "reference", plan=False)
    plain, found = results(single, "reference", plan=False), results(single, "triton", plan=False)
    for name in (x for x in truth if "gradient" in x):
        allowed = 3 * relative_error(plain[name].double(), truth[name]) + 2e-6
        assert relative_error(found[name].double(), truth[name]) <= allowed, name


HALF = [(torch.bfloat16, {"gradient": "unrolled", "base_iters": 1}), (torch.float16, {"tail_iters": 1})]
HALF += [(torch.float16, {"row_mass": torch.logspace(-3, 1, 40)}), (torch.bfloat16, {"tail_iters": 0})]


@pytest.mark.parametrize("case", slow_after(1, HALF), ids=str)
def test_half_inputs(case: tuple[torch.dtype, dict[str, Any]]) -> None:
    """The field is told by halves of its terms there, to 17 bits: gradients are as exact as their rounding."""
    dtype, options = case
    single = call_of(4, 1, 1, 1, 40, 30, 15, dtype=dtype, **options)
    wide = [x.detach().double().requires_grad_() for x in single.leaves]
    out = sinkhorn_attention(*single.leaves, engine="triton", **single.options)
    truth = sinkhorn_attention(*wide, engine="reference", **single.options)
    cotangent = weights(truth).to(dtype)
    found = torch.autograd.grad(out, single.leaves, cotangent)
    for x, y in zip(found, torch.autograd.grad(truth, wide, cotangent.double()), strict=True):
        assert relative_error(x.double(), y) < 2 * torch.finfo(dtype).eps


def test_features_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More features than a tile takes at once, and more of V than of K; their sums of a block each are added."""
    for module in (layout, adjoint):
        monkeypatch.setattr(module, "LARGEST_CHUNK", 16)
    call = call_of(5, 1, 1, 1, 7, 6, 18, tail_iters=1)
    call.value = torch.randn(1, 1, 6, 35, dtype=torch.float64, requires_grad=True)
    call.leaves[2] = call.value
    assert_agrees(call, "triton", plan=False)


@pytest.mark.slow
def test_features_by_blocks_in_the_first_pass_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (layout, adjoint):
        monkeypatch.setattr(module, "LARGEST_CHUNK", 16)
    assert_agrees(call_of(5, 1, 2, 1, 7, 6, 33), "triton", plan=False)


def test_reruns_are_bitwise_equal_and_heads_do_not_touch_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, 16, 16)
    call = call_of(
        6, 1, 2, 2, 20, 18, 4, dtype=torch.float32, tail_iters=1, mask=(2, 1, 18), base_iters=0, relaxation=1.0
    )
    first = results(call, "triton", plan=False)
    start = torch.zeros(1, 2, 20)
    start[:, 1] = 200.0  # leaves the safe range, alone
    call.options["initial_potentials"] = start, torch.zeros(1, 2, 18)
    second = results(call, "triton", plan=False)
    for name in (x for x in first if "gradient" in x):
        head = (slice(None), 0) if first[name].dim() == 4 else (0,)
        assert torch.equal(first[name][head], second[name][head]), name


PLANS: list[dict[str, Any]] = [
    {"dustbin": Dustbin(0.2, 0.1, torch.tensor(0.3, dtype=torch.float64)), "window": (5, 5)},
    {"gradient": "implicit", "relaxation": 1.0},
    {"tail_iters": 0},
    {
        "dustbin": Dustbin(0.2, 0.1),
        "query_segment_ids": torch.arange(9) // 5,
        "key_segment_ids": torch.arange(9) // 4,
        "tail_iters": 1,
    },
]


@pytest.mark.parametrize("options", slow_after(1, PLANS))
def test_the_adjoint_of_log_p(options: dict[str, Any]) -> None:
    call = call_of(7, 1, 1, 1, 9, 9, 3, mask=(9, 9), **options)
    found = []
    for name in ("reference", "triton"):
        log_plan = sinkhorn_plan(call.query, call.key, call.mask, engine=name, log=True, **call.options)
        inside = log_plan > -torch.inf
        loss = (log_plan.masked_fill(~inside, 0.0) * weights(log_plan)).sum()
        found.append(torch.autograd.grad(loss, [call.query, call.key, call.mask]))
    for y, x in zip(*found, strict=True):
        assert relative_error(x, y) < 1e-10


@pytest.mark.slow
def test_second_derivatives() -> None:
    call = call_of(8, 1, 1, 1, 5, 6, 2, tail_iters=1)
    found = []
    for name in ("reference", "triton"):
        out = sinkhorn_attention(*call.leaves, engine=name, **call.options)
        first = torch.autograd.grad((out * weights(out)).sum(), call.leaves, create_graph=True)
        found.append(torch.autograd.grad(sum((x**2).sum() for x in first), call.leaves))
    for y, x in zip(*found, strict=True):
        assert relative_error(x, y) < 1e-10
