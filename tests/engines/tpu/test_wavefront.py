"""The wavefront TPU kernels, interpreted: the conformance suite over bands of several blocks, what they refuse, and
what they hand to the streaming kernels."""

from __future__ import annotations

from typing import Any

import pytest
from marks import slow_after

torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")

import numpy as np  # noqa: E402
import problems  # noqa: E402
import tpu_kernels  # noqa: E402
from conformance import assert_agrees, results  # noqa: E402
from test_conformance import call_of  # noqa: E402
from tpu_interpreter import RACING, watch_races  # noqa: E402

from torch_sinkhorn_attn import Dustbin  # noqa: E402
from torch_sinkhorn_attn.aot import attention  # noqa: E402
from torch_sinkhorn_attn.engines import ENGINES  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.method import choice, run  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.releases import enable_x64  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.wavefront import adjoint, passes  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.wavefront.path import entries_of, path_of  # noqa: E402
from torch_sinkhorn_attn.problem.arguments import prepare  # noqa: E402
from torch_sinkhorn_attn.problem.segments import components  # noqa: E402

ENGINE, WAVEFRONT = "jax wavefront", Lowering("wavefront", interpret=True)
D = torch.float64


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = tpu_kernels.Kernels(WAVEFRONT, ENGINE, xla_backend_optimization_level=0)
    monkeypatch.setitem(ENGINES, ENGINE, kernels)


@pytest.fixture
def never_streamed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return tpu_kernels.without_streaming(monkeypatch, passes, adjoint)


def some_pairs(length: int, size: int, seed: int = 0) -> torch.Tensor:
    """A boolean mask that drops a fifth of the pairs, off the diagonal."""
    keep = torch.rand(length, size, generator=torch.Generator().manual_seed(seed)) > 0.2
    return keep | torch.eye(length, size, dtype=torch.bool)


IDS = torch.tensor([[0] * 60 + [-1] * 10 + [3] * 90, [1] * 50 + [2] * 110])
BENT = torch.stack([torch.linspace(20, 270, 300).round(), 240 * torch.linspace(0.2, 1, 300) ** 1.3])
SHORT = {"base_iters": 2, "tail_iters": 1}
PROBLEMS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "band": ((1, 1, 300, 300, 4), {"window": (50, 50), "base_iters": 3}),
    "more columns": ((1, 1, 300, 700, 4), {"window": (100, 100)} | SHORT),
    "more rows": ((1, 1, 700, 300, 4), {"window": (30, 60)} | SHORT),
    "wide": ((1, 1, 520, 520, 4), {"window": (200, 140)} | SHORT),
    "narrow": ((1, 1, 257, 257, 4), {"window": (1, 1)} | SHORT),
    "lengths": (
        (2, 1, 260, 150, 3),
        {"window": (60, 60), "query_lengths": torch.tensor([260, 133]), "key_lengths": torch.tensor([140, 71])} | SHORT,
    ),
    "longer lengths, steeper": (
        (2, 1, 400, 400, 3),
        {"window": (60, 60), "query_lengths": torch.tensor([400, 210]), "key_lengths": torch.tensor([300, 310])}
        | SHORT,
    ),
    "packed": ((2, 1, 160, 160, 3), {"window": (30, 30), "query_segment_ids": IDS, "key_segment_ids": IDS} | SHORT),
    "masses": (
        (1, 2, 260, 260, 3),
        {"row_mass": 0.5 + torch.rand(260, dtype=D), "window": (40, 40), "base_iters": 1, "tail_iters": 1},
    ),
    "centres": (
        (2, 1, 300, 280, 3),
        {"window": (40, 60), "window_centers": BENT, "relaxation": (1.5, 2.0), "key_lengths": torch.tensor([280, 240])}
        | SHORT,
    ),
    "relaxed, rows with few keys": ((1, 1, 300, 150, 3), {"relaxation": (1.5, 2.0), "window": (1, 0)} | SHORT),
    "over-relaxed": ((1, 1, 260, 260, 3), {"over_relaxation": 1.4, "window": (50, 50), "base_iters": 4}),
    "accelerated": (
        (1, 2, 200, 200, 3),
        {"window": (50, 50), "base_iters": 5, "tail_iters": 1, "acceleration": "chebyshev"},
    ),
    "accelerated, contraction given": (
        (1, 1, 200, 200, 3),
        {
            "window": (50, 50), "base_iters": 3, "tail_iters": 1, "acceleration": "chebyshev", "contraction": 0.8,
            "query_segment_ids": torch.arange(200)[None] // 90, "key_segment_ids": torch.arange(200)[None] // 90,
        },
    ),
    "unrolled": ((1, 1, 200, 200, 3), {"gradient": "unrolled", "window": (50, 50), "base_iters": 2, "tail_iters": 1}),
    "dropout": ((1, 2, 260, 260, 3), {"dropout_p": 0.3, "window": (50, 50)} | SHORT),
    "three kept": ((1, 1, 200, 200, 3), {"window": (50, 50), "base_iters": 1, "tail_iters": 3}),
    "warm start": (
        (1, 1, 260, 200, 3),
        {
            "initial_potentials": (torch.randn(1, 1, 260, dtype=D), torch.randn(1, 1, 200, dtype=D)),
            "window": (50, 50), "base_iters": 1, "tail_iters": 1,
        },
    ),
    "nothing in the second": (
        (2, 1, 200, 140, 3),
        {"window": (50, 50), "query_lengths": torch.tensor([200, 0]), "key_lengths": torch.tensor([140, 0])} | SHORT,
    ),
}  # fmt: skip


ELSEWHERE = {
    "more columns", "more rows", "packed", "wide", "narrow", "longer lengths, steeper", "masses",
    "relaxed, rows with few keys", "over-relaxed", "accelerated", "unrolled", "three kept", "warm start",
    "nothing in the second", "centres", "lengths", "accelerated, contraction given", "dropout",
}  # fmt: skip


def problem_of(name: str) -> problems.Call:
    shape, options = PROBLEMS[name]
    return call_of(7, *shape, **options)


@pytest.mark.parametrize("name", slow_after(0, PROBLEMS, ELSEWHERE))
def test_conformance(name: str, never_streamed: list[Any]) -> None:
    assert_agrees(problem_of(name), ENGINE, plan=False)
    assert never_streamed and all(never_streamed)


@pytest.mark.parametrize("kind", slow_after(0, ["float", "bool", "of keys"], {"bool", "of keys"}))
def test_masks_on_pairs(kind: str, never_streamed: list[Any]) -> None:
    call = call_of(5, 2, 2, 200, 200, 3, window=(40, 40), **SHORT)
    call.mask = some_pairs(200, 200)
    if kind == "float":
        noise = torch.randn(2, 1, 200, 200, dtype=D, generator=torch.Generator().manual_seed(1))
        call.mask = torch.where(call.mask, noise, -torch.inf)
    elif kind == "of keys":
        call.mask = torch.randn(1, 2, 1, 200, dtype=D, generator=torch.Generator().manual_seed(1))
    assert_agrees(call, ENGINE, plan=False)
    assert never_streamed and all(never_streamed)


@pytest.mark.slow
def test_grouped_queries(never_streamed: list[Any]) -> None:
    call = call_of(3, 1, 4, 140, 140, 3, enable_gqa=True, window=(20, 20), **SHORT)
    call.key, call.value = (x.detach()[:, :2].requires_grad_() for x in (call.key, call.value))
    call.leaves[1:3] = call.key, call.value
    assert_agrees(call, ENGINE, plan=False)


@pytest.mark.slow
def test_several_passes_are_one(never_streamed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory that holds two iterations at a time: over-relaxed, for a pass takes on both potentials."""
    call = call_of(5, 1, 1, 200, 200, 3, window=(50, 50), base_iters=5, tail_iters=1, over_relaxation=1.3)
    counts = []
    whole = passes.passes_of

    def short(problem: Any, lowering: Any, residuals: bool) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(passes, "vmem", lambda problem, o: 0 if o.iterations <= 2 else 1 << 40)
            found = whole(problem, lowering, residuals)
        counts.append([o.iterations for o in found])
        return found

    monkeypatch.setattr(passes, "passes_of", short)
    assert_agrees(call, ENGINE, plan=False)
    assert counts[-1] == [2, 2, 2]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["sharp", "steep"])
def test_what_leaves_the_range_or_the_path_is_streamed(name: str) -> None:
    """Scores hundreds apart, and a slope the path was not laid out for: the right answer all the same."""
    if name == "sharp":
        call = call_of(2, 1, 1, 140, 140, 4, window=(40, 40), epsilon=0.02, base_iters=1, tail_iters=1)
    else:
        lengths = {"query_lengths": torch.tensor([20]), "key_lengths": torch.tensor([520])}
        call = call_of(2, 1, 1, 520, 520, 2, window=(20, 20), base_iters=1, tail_iters=1, **lengths)
    prepared = prepare(call.query, call.key, call.value, **call.options)
    with enable_x64():
        given = tpu_kernels.inputs_of(prepared.inputs), tpu_kernels.constants_of(prepared.problem)
        problem, used = run._problem(*given, tpu_kernels.statics_of(prepared.problem), WAVEFRONT)
        assert used.shape == "wavefront" and not bool(passes.solve(problem, used, residuals=False)[1])
    assert_agrees(call, ENGINE, plan=False, tolerance=1e-9)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_no_races(monkeypatch: pytest.MonkeyPatch, never_streamed: list[Any]) -> None:
    """JAX's interpreter of TPU kernels, on two cores, forward and backward."""
    race_states = watch_races(monkeypatch)
    call = call_of(1, 2, 1, 140, 140, 3, base_iters=1, tail_iters=1, window=(8, 8))
    query, key, value = (x.detach().float() for x in (call.query, call.key, call.value))
    kernels = tpu_kernels.Kernels(Lowering("wavefront", RACING))
    prepared = prepare(query, key, value, **call.options)
    result = kernels.forward(prepared.inputs, prepared.problem)
    grads = tpu_kernels.OutputGrads(torch.ones_like(result.output))
    found = kernels.backward(prepared.inputs, prepared.problem, result.output, result.potentials, grads)
    assert torch.isfinite(found.inputs.query).all()
    assert race_states and not any(state.races_found for state in race_states)


# The path and the choice


@pytest.mark.parametrize(
    "sizes", slow_after(3, [(129, 300), (1, 1), (127, 128), (1000, 1000), (3000, 1100), (900, 2900)])
)
@pytest.mark.parametrize("window", [(0, 0), (64, 64), (128, 128), (300, 17)])
def test_every_pair_is_met_in_time(sizes: tuple[int, int], window: tuple[int, int]) -> None:
    """A strip covers its rows' intervals, row blocks come in order, and columns are complete before they are read."""
    length, size = sizes
    x = torch.zeros(1, 1, max(length, size), 1)
    problem = prepare(x[:, :, :length], x[:, :, :size], None, window=window, relaxation=1.0).problem
    statics, constants = tpu_kernels.statics_of(problem), tpu_kernels.constants_of(problem)
    path = path_of(length, size, statics)
    way = entries_of(constants, path, statics, path.lag, path.entries + path.lag)
    assert bool(way.fits)
    row, front = (np.asarray(x)[0, path.lag :] for x in (way.row, way.front))
    steps = np.flatnonzero(row >= 0)
    assert row[steps].tolist() == list(range(path.rows)) and (np.diff(front) <= 1).all() and (np.diff(front) >= 0).all()
    lo, hi = (x[0].numpy() for x in (problem.support.row_lo, problem.support.row_hi))
    end = (np.repeat(front[steps], 128)[:length] - path.width) * 128
    some = lo < hi
    assert (hi[some] <= end[some]).all() and (lo[some] >= end[some] - path.columns).all()
    for step in steps:
        touching = steps[front[steps] - path.width <= front[step] - 1]
        assert touching.max() - step < path.lag


def choice_of(length: int, adjoint: bool = False, generation: str = "v6e", mask=None, **options: Any) -> choice.Choice:
    x = torch.zeros(1, 1, length, 64)
    prepared = prepare(x, x, x, mask, **{"window": (128, 128)} | options)
    given = tpu_kernels.inputs_of(prepared.inputs), tpu_kernels.constants_of(prepared.problem)
    statics = tpu_kernels.statics_of(prepared.problem)
    return choice.choose(*given, statics, Lowering("auto", generation=generation), adjoint)


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", [False, True])
def test_long_bands_are_the_wavefronts(adjoint: bool) -> None:
    """On every generation, wherever the resident kernel has not the memory; shorter ones stay resident."""
    for generation in ("v4", "v5e", "v5p", "v6e", "tpu7x"):
        found = choice_of(50_000, adjoint, generation)
        assert found.shape == "wavefront" and "MiB of VMEM" in found.reason, generation
    assert choice_of(4096, adjoint).shape == "resident"
    assert choice_of(300, adjoint, mask=some_pairs(300, 300)).shape == "wavefront"
    assert choice_of(50_000, adjoint, tolerance=0.1).shape == "wavefront"
    for options in ({"tail_iters": 0}, {"dustbin": Dustbin(0.1, 0.2)}, {"gradient": "implicit"}):
        assert choice_of(50_000, adjoint, **options).shape == "wavefront", options
    assert (
        choice_of(
            300,
            adjoint,
            dustbin=Dustbin(0.1, 0.2),
            query_segment_ids=IDS[:1, :1].expand(1, 300),
            key_segment_ids=IDS[:1, :1].expand(1, 300),
        ).shape
        == "wavefront"
    )
    many, whole = choice_of(50_000, adjoint, tail_iters=9), choice_of(50_000, adjoint, window=None)
    assert many.shape == ("wavefront" if adjoint else "streaming") and (adjoint or "keeps at most 8" in many.reason)
    assert whole.shape == "streaming" and "a window on both sides" in whole.reason


def test_a_way_longer_than_scalar_memory_is_refused() -> None:
    configuration = {"batch": 256, "length": 50_000, "window": (128, 128), "lengths": True}
    given = attention.problem(attention.Configuration.of(configuration))
    found = choice.choose(*given, Lowering("auto", generation="v6e"))
    assert found.shape == "streaming" and "KiB of scalar memory" in found.reason
    given = attention.problem(attention.Configuration.of(configuration | {"lengths": False}))
    assert choice.choose(*given, Lowering("auto", generation="v6e")).shape == "wavefront"


def test_wavefront_refuses_with_the_reason() -> None:
    call = call_of(0, 1, 1, 20, 20, 3)
    with pytest.raises(ValueError, match=r"shape='wavefront' cannot take this problem: .*window.*shape='auto'"):
        results(call, ENGINE, plan=False)


@pytest.mark.parametrize("sizes", [(1, 1), (5, 5), (9, 4), (4, 9), (30, 7), (7, 30), (0, 3), (3, 0)])
def test_a_window_that_joins_all_tokens_is_known_to(sizes: tuple[int, int]) -> None:
    """As the components found from the intervals say, which are data."""
    length, size = sizes
    x = torch.zeros(1, 1, max(sizes), 1)
    for window in ((0, 0), (1, 0), (0, 1), (2, 2), (5, 0), (0, 3), (-1, 0), None):
        problem = prepare(x[:, :, :length], x[:, :, :size], None, window=window, relaxation=1.0).problem
        parts, live = components(problem), problem.support.row_lo < problem.support.row_hi
        one = parts.row is None or not bool(live.any()) or int(parts.row[:, 0][live].max()) == 0
        found = choice.window_joins(tpu_kernels.constants_of(problem), tpu_kernels.statics_of(problem))
        assert found == one, window
