"""One program, one problem: the resident kernels against the definition, in Triton's interpreter on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import problems
import pytest
import torch
import triton_interpreter
from conformance import assert_agrees, relative_error, results
from marks import slow_after

from torch_sinkhorn_attn import Dustbin, sinkhorn_attention
from torch_sinkhorn_attn.engines.triton import interpreted
from torch_sinkhorn_attn.method import staircase

pytest.importorskip("triton")
if not interpreted():
    pytest.skip("TRITON_INTERPRET=1 must be set before Python starts", allow_module_level=True)
triton_interpreter.quicken()

import triton.language as tl  # noqa: E402

from torch_sinkhorn_attn.engines.triton import choice  # noqa: E402
from torch_sinkhorn_attn.engines.triton.resident import run, solve  # noqa: E402

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the resident kernels were asked for."""
    asked: list[str] = []
    for name in ("forward", "backward"):
        verb = getattr(run, name)
        monkeypatch.setattr(run, name, lambda *a, verb=verb, name=name, **k: asked.append(name) or verb(*a, **k))
    yield asked


def call_of(
    length: int, size: int, *, heads: int = 1, kv_heads: int = 1, width: int = 4, **options: Any
) -> problems.Call:
    g = torch.Generator().manual_seed(length + 1000 * size)
    shapes = (heads, length, width), (kv_heads, size, width), (kv_heads, size, 3)
    tensors = [torch.randn(1, *shape, generator=g, dtype=DOUBLE).requires_grad_() for shape in shapes]
    mask = options.pop("mask", None)
    options = {"base_iters": 4, **options, "enable_gqa": heads != kv_heads}
    return problems.Call(0, *tensors, mask, options, list(tensors))


def assert_resident(call: problems.Call, ran: list[str], backward: bool = True, tolerance: float = 1e-10) -> None:
    assert_agrees(call, "triton", tolerance, plan=False)
    assert ran == ["forward", "backward"][: 1 + backward], call


SIZES = [(1, 1), (16, 17), (15, 64), (63, 1), (31, 33), (65, 32), (127, 100), (128, 128)]


@pytest.mark.parametrize("sizes", slow_after(3, SIZES))
def test_every_size(sizes: tuple[int, int], ran: list[str]) -> None:
    assert_resident(call_of(*sizes, base_iters=10), ran)


def block_mask(length: int, size: int) -> torch.Tensor:
    mask = torch.ones(length, size, dtype=torch.bool)
    mask[1], mask[:, 2] = False, False
    return mask


g = torch.Generator().manual_seed(0)
DUSTBIN = Dustbin(torch.randn(5, generator=g, dtype=DOUBLE), torch.randn(7, generator=g, dtype=DOUBLE), 0.3)
WITH_VALUE = Dustbin(1.0, 0.5, row_capacity=40.0, value=torch.randn(3, generator=g, dtype=DOUBLE))
OPTIONS: dict[str, dict[str, Any]] = {
    "dustbin": {"dustbin": DUSTBIN, "tail_iters": 1},
    "chebyshev": {"acceleration": "chebyshev", "base_iters": 7},
    "relaxed, over-relaxed": {"relaxation": (2.0, 0.7), "over_relaxation": 1.3},
    "softmax": {"base_iters": 0, "tail_iters": 0},
    "R = 0": {"tail_iters": 0},
    "R = 3, warm": {
        "tail_iters": 3,
        "initial_potentials": tuple(torch.randn(n, generator=g, dtype=DOUBLE) for n in (5, 7)),
    },
    "components": {"window": (1, 1), "size": 10},
    "dustbin with a value": {"dustbin": WITH_VALUE, "dropout_p": 0.3},
    "given contraction": {"acceleration": "chebyshev", "contraction": 0.8, "base_iters": 6},
    "tolerance": {"tolerance": 0.05, "base_iters": 20},
    "relaxed rows": {"relaxation": (0.5, None), "tail_iters": 0},
    "mask": {"mask": block_mask(5, 7).expand(1, 1, 5, 7)},
    "float mask": {"mask": torch.randn(1, 1, 5, 1, generator=g, dtype=DOUBLE).expand(1, 1, 5, 7)},
    "window": {"window": (3, 3)},
    "lengths": {"query_lengths": torch.tensor([3]), "key_lengths": torch.tensor([6])},
    "masses": {"row_mass": torch.rand(5, generator=g, dtype=DOUBLE) + 0.5},
    "dropout": {"dropout_p": 0.4, "heads": 2},
    "grouped queries": {"heads": 4, "kv_heads": 2},
    "wide features": {"width": 70, "scale": 0.2},
}


@pytest.mark.parametrize("name", slow_after(6, OPTIONS))
def test_every_option(name: str, ran: list[str]) -> None:
    options = dict(OPTIONS[name])
    assert_resident(call_of(5, options.pop("size", 7), **options), ran)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 60, 20))
def test_random_problems(start: int, ran: list[str]) -> None:
    for seed in range(start, start + 20):
        call = problems.make(seed)
        packed = "query_segment_ids" in call.options
        if packed or call.query.shape[:-2].numel() > 3:  # a program for each head: a third of a second
            continue
        assert_agrees(call, "triton", plan=False)
    assert "forward" in ran


@pytest.mark.parametrize("tail_iters", slow_after(1, [2, 0]))
def test_factors_entry_by_entry(tail_iters: int, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As where duals lie too far apart for exponentials of vectors."""
    monkeypatch.setitem(staircase.LARGEST_EXPONENT, DOUBLE, -1e9)
    assert_resident(call_of(6, 5, tail_iters=tail_iters, dustbin=Dustbin(0.1, 0.2)), ran)


@pytest.mark.parametrize(
    "options",
    slow_after(1, [{"tail_iters": 1}, {"over_relaxation": 1.2}, {"tail_iters": 0, "dustbin": Dustbin(0.1, 0.2)}]),
)
def test_scalings_that_leave_their_range(
    options: dict[str, Any], ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every iteration by logarithms, which gives the same."""
    monkeypatch.setattr(solve, "LARGEST_SCALING", tl.constexpr(1.0 + 1e-6))
    monkeypatch.setattr(solve, "SMALLEST_SCALING", tl.constexpr(1.0 - 1e-6))
    assert_resident(call_of(5, 6, **options), ran)


@pytest.mark.parametrize("epsilon", slow_after(1, [1e-3, 1.0]))
def test_scores_of_ten_thousand(epsilon: float, ran: list[str]) -> None:
    """The definition's result, whatever the scalings; gradients are all but lost to rounding in every engine, but
    finite, in float32 too."""
    call = call_of(6, 7, epsilon=epsilon, base_iters=12)
    for x in (call.query, call.key):
        x.data.mul_(70)
    truth, found = (results(call, engine, plan=False) for engine in ("reference", "triton"))
    for name, y in truth.items():
        assert relative_error(found[name], y, floor=1.0) < (1e-6 / epsilon**2 if "gradient" in name else 1e-6), name
    single = [x.detach().float().requires_grad_() for x in (call.query, call.key, call.value)]
    out = sinkhorn_attention(*single, epsilon=epsilon, engine="triton")
    assert out.isfinite().all() and ran == ["forward", "backward", "forward"]
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.square().sum(), single))


@pytest.mark.parametrize(
    "options",
    slow_after(1, [{"epsilon": 0.3}, {"relaxation": 1.0}, {"window": (8, 8)}, {"dustbin": Dustbin(1.0, 0.5)}]),
)
def test_float32_is_as_exact_as_plain_float32_pytorch(options: dict[str, Any], ran: list[str]) -> None:
    call = call_of(33, 40, base_iters=12, **options)
    truth = results(call, "reference", plan=False)
    tensors = [x.detach().float().requires_grad_() for x in (call.query, call.key, call.value)]
    single = problems.Call(0, *tensors, None, call.options, tensors)
    plain, found = results(single, "reference", plan=False), results(single, "triton", plan=False)
    assert ran == ["forward", "backward"]
    for name, y in truth.items():
        if "residual" not in name:
            allowed = (3 if "gradient" in name else 2) * relative_error(plain[name].double(), y) + 2e-6
            assert relative_error(found[name].double(), y) <= allowed, name


@pytest.mark.parametrize("dtype", slow_after(1, [torch.float16, torch.bfloat16]))
def test_half_inputs_compute_in_float32(dtype: torch.dtype, ran: list[str]) -> None:
    call = call_of(40, 40, width=16)
    half = [x.detach().to(dtype).requires_grad_() for x in (call.query, call.key, call.value)]
    wide = [x.detach().double().requires_grad_() for x in half]
    out, aux = sinkhorn_attention(*half, engine="triton", return_aux=True)
    truth = sinkhorn_attention(*wide, engine="reference")
    assert out.dtype == dtype and aux.row_potential.dtype == torch.float32 and aux.row_residual.max() < 1e-4
    rounding = 1e-2 if dtype == torch.bfloat16 else 2e-3
    assert relative_error(out.double(), truth) < rounding
    for x, y in zip(torch.autograd.grad(out.sum(), half), torch.autograd.grad(truth.sum(), wide), strict=True):
        assert x.dtype == dtype and relative_error(x.double(), y) < 2 * rounding
    assert ran == ["forward", "backward"]


@pytest.mark.slow
def test_reruns_are_bitwise_equal_and_read_nothing_uninitialised(ran: list[str]) -> None:
    call = call_of(9, 18, heads=2, dustbin=Dustbin(1.0, 0.5), acceleration="chebyshev", dropout_p=0.2)
    torch.use_deterministic_algorithms(True)  # which fills torch.empty with NaN
    try:
        first, second = (results(call, "triton", plan=False) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[k], second[k]) and first[k].isfinite().all() for k in first)
    assert ran == ["forward", "backward"] * 2


@pytest.mark.parametrize(
    "options", slow_after(1, [{}, {"acceleration": "chebyshev"}, {"base_iters": 0, "tail_iters": 0}])
)
def test_a_nan_is_seen(options: dict[str, Any], ran: list[str]) -> None:
    call = call_of(5, 6, **options)
    call.key.data[0, 0, 2, 1] = torch.nan
    out = sinkhorn_attention(call.query, call.key, call.value, engine="triton", **call.options)
    assert out.isnan().all() and ran == ["forward"]


REFUSALS = [
    ({}, (129, 5), False, "129 x 5 lines: registers hold the plan of 128 x 128"),
    ({"dustbin": Dustbin(1.0, 1.0)}, (5, 128), False, "6 x 129 lines, the dustbin among them"),
    ({"query_segment_ids": torch.zeros(5, dtype=torch.int64)}, (5, 5), False, "packed segments"),
    ({"gradient": "implicit"}, (5, 5), True, "the implicit gradient"),
    ({"gradient": "unrolled", "base_iters": 20}, (5, 5), True, "22 iterations are differentiated"),
]


@pytest.mark.parametrize(("options", "sizes", "adjoint", "words"), REFUSALS)
def test_what_is_refused_and_why(
    options: dict[str, Any], sizes: tuple[int, int], adjoint: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice says it, and goes to the streaming kernels."""
    seen: list[tuple[Any, Any]] = []

    class Looked(Exception):
        pass

    def look(inputs: Any, problem: Any, *rest: Any, **more: Any) -> Any:
        seen.append((inputs, problem))
        raise Looked

    with monkeypatch.context() as patched:
        patched.setattr(choice, "kernels", look)
        call = call_of(*sizes, **options)
        if "query_segment_ids" in options:
            call.options["key_segment_ids"] = options["query_segment_ids"]
        with pytest.raises(Looked), torch.no_grad():
            sinkhorn_attention(call.query, call.key, call.value, engine="triton", **call.options)
    found = choice.choose(*seen[0], adjoint=adjoint)
    assert found.shape == "streaming" and words in found.reason
    if adjoint:
        assert choice.choose(*seen[0]).shape == "resident"


def test_warps_by_the_table() -> None:
    from torch_sinkhorn_attn.engines.triton.resident.arguments import warps

    assert [warps(n, n, kind) for n in (128, 64, 32, 16) for kind in range(3)] == [4, 8, 8, 2, 4, 4, 1, 1, 1, 1, 1, 1]
