"""The resident TPU kernels, interpreted: the conformance suite over strips of several blocks, what they refuse, and
what they hand to the streaming kernels."""

from __future__ import annotations

from typing import Any

import pytest
from marks import slow_after

torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")

import numpy as np  # noqa: E402
import problems  # noqa: E402
import tpu_kernels  # noqa: E402
from conformance import assert_agrees, relative_error, results  # noqa: E402
from test_conformance import call_of  # noqa: E402
from tpu_interpreter import RACING, watch_races  # noqa: E402

from torch_sinkhorn_attn import Dustbin  # noqa: E402
from torch_sinkhorn_attn.engines import ENGINES  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.method import choice, run  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.method.problem import Statics  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.releases import enable_x64  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.resident import (  # noqa: E402
    adjoint as resident_adjoint,
    passes as resident,
    strip as resident_strip,
)
from torch_sinkhorn_attn.problem.arguments import prepare  # noqa: E402

ENGINE, RESIDENT = "jax resident", Lowering("resident", interpret=True)
D = torch.float64


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = tpu_kernels.Kernels(RESIDENT, ENGINE, xla_backend_optimization_level=0)
    monkeypatch.setitem(ENGINES, ENGINE, kernels)


@pytest.fixture
def never_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' own results, whatever the data: else the streaming ones would cover for them."""
    for module in (resident, resident_adjoint):
        monkeypatch.setattr(module, "resident_or_streamed", lambda suited, resident, streamed: resident())


IDS = torch.tensor([[0] * 60 + [-1] * 10 + [3] * 90, [1] * 50 + [2] * 110])
SHORT = {"base_iters": 3}
PROBLEMS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "one token": ((1, 1, 1, 1, 3), SHORT),
    "full": ((1, 2, 130, 150, 5), {"base_iters": 4, "tail_iters": 3}),
    "band": ((1, 1, 300, 300, 4), {"window": (50, 50)} | SHORT),
    "band of a rectangle, lengths": (
        (2, 1, 260, 150, 3),
        {"window": (60, 60), "query_lengths": torch.tensor([260, 133]), "key_lengths": torch.tensor([140, 71])} | SHORT,
    ),
    "packed band": (
        (2, 1, 160, 160, 3),
        {"window": (30, 30), "query_segment_ids": IDS, "key_segment_ids": IDS} | SHORT,
    ),
    "masses": ((1, 2, 130, 140, 3), {"row_mass": 0.5 + torch.rand(130, dtype=D), "base_iters": 1, "tail_iters": 1}),
    "relaxed, rows without keys": ((1, 1, 300, 150, 3), {"relaxation": (1.5, 2.0), "window": (0, 0)} | SHORT),
    "over-relaxed": ((1, 1, 130, 20, 3), {"over_relaxation": 1.4, "base_iters": 6}),
    "accelerated": ((2, 1, 140, 150, 3), {"acceleration": "chebyshev", "base_iters": 5}),
    "accelerated, given": ((1, 1, 130, 140, 3), {"acceleration": "chebyshev", "contraction": 0.8, "base_iters": 5}),
    "accelerated, dustbin, tolerance": (
        (2, 1, 140, 20, 3),
        {"acceleration": "chebyshev", "base_iters": 5, "tolerance": 1e-2, "dustbin": Dustbin(0.1, 0.2)},
    ),
    "accelerated, given, dustbin, relaxed, warm": (
        (1, 1, 20, 140, 3),
        {
            "acceleration": "chebyshev", "contraction": 0.7, "base_iters": 5, "relaxation": (2.0, 1.5),
            "dustbin": Dustbin(0.1, 0.2),
            "initial_potentials": (torch.randn(1, 1, 21, dtype=D), torch.randn(1, 1, 141, dtype=D)),
        },
    ),
    "accelerated packed band": (
        (2, 1, 160, 160, 3),
        {
            "window": (30, 30), "query_segment_ids": IDS, "key_segment_ids": IDS, "acceleration": "chebyshev",
            "contraction": 0.8, "base_iters": 5,
        },
    ),
    "tolerance": ((2, 1, 20, 140, 3), {"tolerance": 1e-2, "over_relaxation": 0.8}),
    "unrolled": ((1, 1, 130, 40, 3), {"gradient": "unrolled", "base_iters": 4}),
    "no base": ((1, 1, 30, 130, 3), {"base_iters": 0, "tail_iters": 2}),
    "dropout": ((1, 2, 140, 130, 3), {"dropout_p": 0.3} | SHORT),
    "dustbin": (
        (1, 2, 140, 30, 3),
        {"dustbin": Dustbin(torch.randn(140, dtype=D), torch.randn(30, dtype=D), 0.3, value=torch.randn(3, dtype=D))},
    ),
    "dustbin, over-relaxed, relaxed, early": (
        (2, 1, 150, 140, 3),
        {
            "dustbin": Dustbin(0.1, 0.2), "over_relaxation": 1.3, "tolerance": 1e-2, "relaxation": 2.0,
            "window": (50, 50), "query_lengths": torch.tensor([150, 100]), "key_lengths": torch.tensor([140, 60]),
        },
    ),
    "nothing in the second": (
        (2, 1, 130, 20, 3),
        {"query_lengths": torch.tensor([130, 0]), "key_lengths": torch.tensor([20, 0])} | SHORT,
    ),
    "nothing in the second, dustbin": (
        (2, 1, 6, 8, 3),
        {"query_lengths": torch.tensor([6, 0]), "key_lengths": torch.tensor([8, 0]), "dustbin": Dustbin(0.1, 0.2)},
    ),
    "nothing in the second, dustbin, relaxed": (
        (2, 1, 6, 8, 3),
        {
            "query_lengths": torch.tensor([6, 0]), "key_lengths": torch.tensor([8, 0]),
            "dustbin": Dustbin(0.1, 0.2), "relaxation": 2.0, "over_relaxation": 1.2,
        },
    ),
    "warm start": (
        (1, 1, 140, 30, 3),
        {"initial_potentials": (torch.randn(1, 1, 140, dtype=D), torch.randn(1, 1, 30, dtype=D)), "base_iters": 2},
    ),
}  # fmt: skip


ELSEWHERE = {
    "band", "masses", "relaxed, rows without keys", "over-relaxed", "accelerated", "accelerated, given",
    "accelerated, dustbin, tolerance", "accelerated packed band", "tolerance", "unrolled", "no base", "dustbin",
    "nothing in the second", "nothing in the second, dustbin", "nothing in the second, dustbin, relaxed", "warm start",
    "full", "dropout",
}  # fmt: skip


EMPTY = [name for name in PROBLEMS if "nothing" in name]


def problem_of(name: str) -> problems.Call:
    shape, options = PROBLEMS[name]
    return call_of(7, *shape, **options)


@pytest.mark.parametrize("name", slow_after(1, PROBLEMS, ELSEWHERE))
def test_conformance(name: str, never_streamed: None) -> None:
    assert_agrees(problem_of(name), ENGINE, plan=False)


@pytest.mark.slow
def test_grouped_queries(never_streamed: None) -> None:
    call = call_of(3, 1, 4, 20, 140, 3, enable_gqa=True, base_iters=2)
    call.key, call.value = (x.detach()[:, :2].requires_grad_() for x in (call.key, call.value))
    call.leaves[1:3] = call.key, call.value
    assert_agrees(call, ENGINE, plan=False)


def single(call: problems.Call, dtype: torch.dtype) -> problems.Call:
    leaves = [x.detach().to(dtype).requires_grad_() for x in call.leaves]
    return problems.Call(call.seed, *leaves[:3], options=call.options, leaves=leaves)


@pytest.mark.slow
def test_float32_is_as_exact_as_plain_float32_pytorch(never_streamed: None) -> None:
    """Within 2x (values) and 3x (gradients) of the reference's own float32 error, plus two roundings."""
    call = call_of(5, 1, 2, 300, 300, 16, window=(90, 90))
    truth = results(call, "reference", plan=False)
    plain, found = (results(single(call, torch.float32), name, plan=False) for name in ("reference", ENGINE))
    for name, y in truth.items():
        if "residual" not in name:
            allowed = (3 if "gradient" in name else 2) * relative_error(plain[name].double(), y) + 2e-6
            assert relative_error(found[name].double(), y) <= allowed, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base_dtype", "options"),
    [
        pytest.param("float32", {}, marks=pytest.mark.exhaustive, id="float32"),
        pytest.param("bfloat16", {}, id="bfloat16"),
        pytest.param(
            "bfloat16",
            {"acceleration": "chebyshev", "base_iters": 10, "row_mass": 0.5 + torch.rand(140)},
            marks=pytest.mark.exhaustive,
            id="accelerated, masses",
        ),
        pytest.param(
            "bfloat16",
            {"acceleration": "chebyshev", "contraction": 0.8, "dustbin": Dustbin(0.1, 0.2)},
            id="accelerated, dustbin",
        ),
    ],
)
def test_bfloat16(
    base_dtype: str, options: dict[str, Any], never_streamed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs in bfloat16 compute in float32; a base in bfloat16 moves u^0, not the surrogate taken from it."""
    kernels = tpu_kernels.Kernels(Lowering("resident", True, base_dtype), ENGINE, xla_backend_optimization_level=0)
    monkeypatch.setitem(ENGINES, ENGINE, kernels)
    half = single(call_of(1, 1, 2, 140, 150, 16, **options), torch.bfloat16)
    wide = single(half, D)
    truth, found = results(wide, "reference", plan=False), results(half, ENGINE, plan=False)
    assert found["output"].dtype == torch.bfloat16 and found["row_potential"].dtype == torch.float32
    largest = 140 if "dustbin" in options else 1  # of the masses: a dustbin takes them all
    assert found["row_residual"].max() < 1e-5 * largest and found["col_residual"].max() < 1e-2
    for name, y in truth.items():
        if "residual" not in name:
            assert relative_error(found[name].double(), y) < 2e-2, name


@pytest.mark.parametrize("name", slow_after(0, EMPTY, EMPTY[:-1]))
def test_empty_problems_keep_the_batch_in_range(name: str) -> None:
    call = problem_of(name)
    prepared = prepare(call.query, call.key, call.value, **call.options)
    statics = tpu_kernels.statics_of(prepared.problem)
    with enable_x64():
        given = tpu_kernels.inputs_of(prepared.inputs), tpu_kernels.constants_of(prepared.problem)
        problem, _ = run._problem(*given, statics, RESIDENT)
        strip = resident_strip.strip_of(problem.length, problem.size, statics)
        first, fits = resident_strip.first_blocks(given[1], strip)
        assert bool(fits) and bool(resident.solve_resident(problem, RESIDENT, strip, first, True)[1])


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", slow_after(0, ["sharp", "steep"], {"steep"}))
def test_what_leaves_the_range_or_the_strip_is_streamed(name: str) -> None:
    """Scores hundreds apart, and a slope the strip was not laid out for: the right answer all the same."""
    if name == "sharp":
        call = call_of(2, 1, 1, 140, 20, 4, epsilon=0.02, base_iters=1, tail_iters=1)
    else:
        lengths = {"query_lengths": torch.tensor([20]), "key_lengths": torch.tensor([520])}
        call = call_of(2, 1, 1, 520, 520, 2, window=(20, 20), base_iters=1, tail_iters=1, **lengths)
    prepared = prepare(call.query, call.key, call.value, **call.options)
    inputs, statics = tpu_kernels.inputs_of(prepared.inputs), tpu_kernels.statics_of(prepared.problem)
    with enable_x64():
        inputs = tpu_kernels.inputs_of(prepared.inputs)
        constants = tpu_kernels.constants_of(prepared.problem)
        problem, used = run._problem(inputs, constants, statics, RESIDENT)
        strip = resident_strip.strip_of(problem.length, problem.size, statics)
        first, fits = resident_strip.first_blocks(constants, strip)
        _, in_range = resident.solve_resident(problem, RESIDENT, strip, first, True)
    assert used.shape == "resident"
    assert (bool(fits), bool(in_range) or name == "steep") == (name == "sharp", name == "steep")
    assert_agrees(call, ENGINE, plan=False, tolerance=1e-9)


@pytest.mark.slow
def test_no_races(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX's interpreter of TPU kernels, on two cores, forward and backward."""
    race_states = watch_races(monkeypatch)
    call = single(call_of(1, 2, 1, 130, 20, 3, base_iters=1, tail_iters=1, dustbin=Dustbin(0.1, 0.2)), torch.float32)
    kernels = tpu_kernels.Kernels(Lowering("resident", RACING))
    prepared = prepare(call.query, call.key, call.value, **call.options)
    result = kernels.forward(prepared.inputs, prepared.problem)
    grads = tpu_kernels.OutputGrads(torch.ones_like(result.output))
    found = kernels.backward(prepared.inputs, prepared.problem, result.output, result.potentials, grads)
    assert torch.isfinite(found.inputs.query).all()
    assert race_states and not any(state.races_found for state in race_states)


# The strip and the choice


def test_the_strip_covers_every_interval() -> None:
    for length, size, window in (
        (1000, 1000, (128, 128)),
        (700, 300, (5, 40)),
        (300, 999, (64, 0)),
        (129, 128, (1, 1)),
    ):
        x = torch.zeros(1, 1, max(length, size), 1)
        relaxed = {"relaxation": 1.0}
        problem = prepare(x[:, :, :length], x[:, :, :size], None, window=window, **relaxed).problem
        statics = tpu_kernels.statics_of(problem)
        strip = resident_strip.strip_of(length, size, statics)
        first, fits = resident_strip.first_blocks(tpu_kernels.constants_of(problem), strip)
        assert bool(fits)
        start = np.repeat(np.asarray(first)[0], 128)[:length] * 128
        lo, hi = problem.support.row_lo[0], problem.support.row_hi[0]
        some = lo < hi
        assert bool(((torch.from_numpy(start) <= lo) & (hi <= torch.from_numpy(start) + strip.columns))[some].all())
    assert resident_strip.strip_of(8192, 8192, Statics(1.0, banded=True, window_left=128, window_right=128)).width == 3


def choice_of(*shape: int, generation: str = "v6e", adjoint: bool = False, mask=None, **options: Any) -> choice.Choice:
    num, heads, length, size, width = shape
    q, k = torch.zeros(num, heads, length, width), torch.zeros(num, heads, size, width)
    prepared = prepare(q, k, k, mask, **options)
    given = tpu_kernels.inputs_of(prepared.inputs), tpu_kernels.constants_of(prepared.problem)
    lowering = Lowering("auto", generation=generation)
    return choice.choose(*given, tpu_kernels.statics_of(prepared.problem), lowering, adjoint)


def test_the_choice_is_explained() -> None:
    assert choice_of(1, 1, 1024, 1024, 64).shape == "resident"
    long = choice_of(1, 1, 4096, 4096, 64, generation="v5p")
    assert long.shape == "streaming" and "MiB of VMEM, and v5p has 60.0 MiB" in long.reason and long.vmem > 60 << 20
    padding = torch.ones(1, 1, 1, 200, dtype=torch.bool)
    assert choice_of(1, 1, 200, 200, 8, mask=padding).shape == "resident"
    assert "attn_mask" in choice_of(1, 1, 200, 200, 8, mask=torch.zeros(200, 200)).reason
    assert "tail" in choice_of(1, 1, 200, 200, 8, tail_iters=0).reason
    assert choice_of(1, 1, 200, 200, 8, gradient="implicit").shape == "resident"
    assert "linear system" in choice_of(1, 1, 200, 200, 8, gradient="implicit", adjoint=True).reason
    ids = {"query_segment_ids": torch.zeros(1, 200), "key_segment_ids": torch.zeros(1, 200)}
    ids = {name: x.long() for name, x in ids.items()}
    assert "packed" in choice_of(1, 1, 200, 200, 8, tolerance=0.1, **ids).reason
    fast = {"acceleration": "chebyshev"}
    assert choice_of(1, 1, 200, 200, 8, **fast).shape == "resident"
    assert "segment by segment" in choice_of(1, 1, 200, 200, 8, **fast, **ids).reason
    assert choice_of(1, 1, 200, 200, 8, **fast, **ids, adjoint=True).shape == "resident"
    assert choice_of(1, 1, 200, 200, 8, **fast, contraction=0.8, **ids).shape == "resident"
    for options in ({"scale": -1.0}, {"scale": 0.0}, {"epsilon": 1e37}):
        assert "scale/epsilon" in choice_of(1, 1, 200, 200, 8, **options).reason


def test_resident_refuses_with_the_reason() -> None:
    call = call_of(0, 1, 1, 20, 20, 3, tail_iters=0)
    with pytest.raises(ValueError, match=r"cannot take this problem: without tail iterations.*shape='auto'"):
        results(call, ENGINE, plan=False)
    for arguments in ({"shape": "warp"}, {"base_dtype": "int8"}, {"generation": "v1"}):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))}=.* is unknown; choose"):
            Lowering(**arguments)
