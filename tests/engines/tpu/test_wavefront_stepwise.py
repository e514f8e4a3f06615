"""The wavefront kernels where something couples all rows, a dustbin or a tolerance, and without a tail, against the
definition."""

from __future__ import annotations

from typing import Any

import pytest
from marks import slow_after

torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")

import problems  # noqa: E402
import tpu_kernels  # noqa: E402
from conformance import assert_agrees, results  # noqa: E402
from test_conformance import call_of  # noqa: E402

from torch_sinkhorn_attn import Dustbin  # noqa: E402
from torch_sinkhorn_attn.engines import ENGINES  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.wavefront import adjoint, passes, stepwise  # noqa: E402

ENGINE = "jax wavefront"
D = torch.float64


@pytest.fixture(autouse=True)
def suited(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    kernels = tpu_kernels.Kernels(Lowering("wavefront", interpret=True), ENGINE, xla_backend_optimization_level=0)
    monkeypatch.setitem(ENGINES, ENGINE, kernels)
    return tpu_kernels.without_streaming(monkeypatch, passes, adjoint, stepwise)


IDS = torch.tensor([[0] * 60 + [-1] * 10 + [3] * 90, [1] * 50 + [2] * 110])
PACKED = {"query_segment_ids": IDS, "key_segment_ids": IDS}
SHORT = {"base_iters": 2, "tail_iters": 1}


def bins(length: int, size: int) -> Dustbin:
    g = torch.Generator().manual_seed(0)
    return Dustbin(*(torch.randn(2, n, generator=g, dtype=D) for n in (length, size)), corner_score=0.3)


PROBLEMS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "dustbin": ((1, 2, 200, 150, 3), {"window": (30, 40), "dustbin": bins(200, 150)} | SHORT),
    "packed dustbin, early": (
        (2, 2, 160, 160, 3),
        {"window": (30, 30), "dustbin": bins(160, 160), "tolerance": 0.3, "base_iters": 6, "tail_iters": 2} | PACKED,
    ),
    "early": ((2, 1, 200, 200, 3), {"window": (60, 60), "tolerance": 0.2, "base_iters": 8, "tail_iters": 1}),
    "early, packed, relaxed": (
        (2, 1, 160, 160, 3),
        {"window": (30, 30), "tolerance": 0.05, "relaxation": (1.5, 0.7), "base_iters": 6, "tail_iters": 1} | PACKED,
    ),
    "dustbin, relaxed, lines without a pair": (
        (2, 1, 200, 200, 3),
        {
            "window": (5, 5), "window_centers": torch.arange(200).clamp(max=120), "dustbin": Dustbin(0.3, -0.2),
            "relaxation": 2.0, "query_lengths": torch.tensor([200, 130]), "key_lengths": torch.tensor([190, 200]),
        } | SHORT,
    ),
    "dustbin, warm, masses": (
        (1, 1, 140, 150, 3),
        {
            "window": (30, 30), "dustbin": Dustbin(0.3, -0.2, row_capacity=30.0),
            "initial_potentials": (torch.randn(1, 1, 141, dtype=D), torch.randn(1, 1, 151, dtype=D)),
            "row_mass": 0.5 + torch.rand(140, dtype=D, generator=torch.Generator().manual_seed(1)),
        } | SHORT,
    ),
    "implicit": (
        (1, 1, 150, 140, 3),
        {"window": (40, 40), "gradient": "implicit", "base_iters": 20, "relaxation": (0.3, 0.4)},
    ),
    "implicit, dustbin": (
        (1, 2, 140, 140, 3), {"window": (30, 40), "dustbin": bins(140, 140), "gradient": "implicit", "base_iters": 60},
    ),
    "no tail": ((2, 1, 200, 150, 3), {"window": (50, 50), "base_iters": 3, "tail_iters": 0}),
    "no tail, accelerated": (
        (1, 1, 200, 200, 3),
        {"window": (50, 50), "base_iters": 5, "tail_iters": 0, "acceleration": "chebyshev"},
    ),
    "no tail, dustbin": (
        (1, 2, 140, 140, 3),
        {"window": (30, 40), "dustbin": bins(140, 140), "tail_iters": 0, "base_iters": 2},
    ),
}  # fmt: skip


EXHAUSTIVE = {
    "dustbin", "early", "early, packed, relaxed", "dustbin, warm, masses", "implicit", "no tail",
    "no tail, accelerated", "packed dustbin, early", "dustbin, relaxed, lines without a pair", "no tail, dustbin",
}  # fmt: skip


@pytest.mark.parametrize("name", slow_after(0, PROBLEMS, EXHAUSTIVE))
def test_conformance(name: str, suited: list[Any]) -> None:
    shape, options = PROBLEMS[name]
    assert_agrees(call_of(7, *shape, **options), ENGINE, plan=False)
    assert suited and all(suited)


def test_problems_end_early() -> None:
    """Those with a tolerance above: some head before its last iteration, and none of the examples all of them."""
    for name, (shape, options) in PROBLEMS.items():
        if "tolerance" in options:
            call = call_of(7, *shape, **options)
            with_it, without = (
                results(problems.Call(7, call.query, call.key, call.value, None, o, call.leaves), "tiled", plan=False)[
                    "output"
                ]
                for o in (options, options | {"tolerance": None})
            )
            assert not torch.equal(with_it, without), name


def test_where_a_base_ends() -> None:
    changes = torch.tensor([[9.0, 0.1, 3.0, 0.4, 0.5, 0.1], [9.0, 0.1, 0.1, 5.0, 5.0, 5.0], [9.0] * 5 + [torch.nan]])
    given = jax.numpy.asarray(changes.repeat_interleave(8, 1)[None, :, :, None].expand(-1, -1, -1, 128).numpy())
    found = passes.ended(given, 0.5)
    assert found[0].tolist() == [[False, False, True, True, True], [False, True, True, True, True], [False] * 5]


@pytest.mark.slow
def test_masks_on_pairs(suited: list[Any]) -> None:
    call = call_of(5, 2, 2, 150, 150, 3, window=(40, 40), dustbin=bins(150, 150), tolerance=0.1, **SHORT)
    g = torch.Generator().manual_seed(1)
    mask = torch.randn(2, 1, 150, 150, generator=g, dtype=D)
    mask[:, :, 20] = -torch.inf
    call.mask = mask.masked_fill(torch.rand(150, 150, generator=g) < 0.2, -torch.inf)
    assert_agrees(call, ENGINE, plan=False)
    assert suited and all(suited)


def test_refused_with_the_reason() -> None:
    for options, why in (
        ({"dustbin": Dustbin(0.1, 0.2), "over_relaxation": 1.2}, "beside a dustbin its passes make plain iterations"),
        ({"tolerance": 0.1, "acceleration": "chebyshev"}, "beside a tolerance its passes make plain iterations"),
        ({"base_iters": 0, "tail_iters": 0}, "without tail iterations"),
        ({"tail_iters": 9}, "keeps at most 8"),
        ({"base_iters": 3, "tail_iters": 0, "over_relaxation": 1.2}, "and be plain"),
    ):
        with pytest.raises(ValueError, match=f"shape='wavefront' cannot take this problem: .*{why}"):
            results(call_of(0, 1, 1, 20, 20, 3, window=(5, 5), **options), ENGINE, plan=False)
