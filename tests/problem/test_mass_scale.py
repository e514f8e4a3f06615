"""The unit of mass: balanced problems do not depend on it, relaxed ones as the definition says, and engines solve each
head in one of their own."""

from __future__ import annotations

from typing import Any

import problems
import pytest
import torch
from conformance import ENGINES, relative_error, results
from marks import slow_after
from torch import Tensor

from torch_sinkhorn_attn import Dustbin, certify, set_checks, sinkhorn_attention, sinkhorn_plan
from torch_sinkhorn_attn.problem import arguments, mass_scale

D = torch.float64
SCALES = {torch.float32: (1e-20, 1e-36, 1e-39, 1e-44, 1e30, 1e300), D: (1e-3, 1e-300, 1e-307, 1e300)}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softmax": {"base_iters": 0, "tail_iters": 0},
    "over-relaxed": {"over_relaxation": 1.4, "base_iters": 2},
    "tolerance": {"over_relaxation": 1.2, "tolerance": 1e-3},
    "accelerated": {"acceleration": "chebyshev", "base_iters": 6},
    "unrolled": {"gradient": "unrolled", "base_iters": 3},
    "implicit": {"gradient": "implicit", "base_iters": 200},
    "dustbin": {"dustbin": True},
    "warm start": {"initial_potentials": (torch.linspace(0, 1, 8), torch.linspace(1, -1, 8)), "base_iters": 0},
    "segments": {"query_segment_ids": torch.arange(8) // 4, "key_segment_ids": torch.arange(8) // 4},
}
RELAXED: dict[str, dict[str, Any]] = {
    "both": {"relaxation": 1.0},
    "unequal": {"relaxation": (0.3, 4.0), "base_iters": 2},
    "rows": {"relaxation": (1.0, None), "base_iters": 1},
    "columns": {"relaxation": (None, 0.5), "base_iters": 1, "over_relaxation": 1.3},
    "no iterations": {"relaxation": (1.0, 2.0), "base_iters": 0, "tail_iters": 0},
    "accelerated": {"relaxation": (1.0, 2.0), "acceleration": "chebyshev", "contraction": 0.7, "base_iters": 4},
    "nearly balanced": {"relaxation": 1e9, "base_iters": 3},
    "dustbin": {"relaxation": (1.0, 2.0), "dustbin": True, "base_iters": 2},
    "implicit": {"relaxation": 1.0, "gradient": "implicit", "base_iters": 60},
}


def call(name: str, options: dict[str, Any], scale: float, dtype: torch.dtype = D) -> problems.Call:
    """Two heads whose masses differ, times `scale`."""
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, 2, 8, 4, generator=g, dtype=D).to(dtype).requires_grad_() for _ in range(3)]
    row = torch.stack([torch.linspace(0.5, 2, 8, dtype=D), torch.linspace(3, 1, 8, dtype=D)])
    options = options | {"row_mass": row * scale}
    if name != "segments":
        options["col_mass"] = row.flip(-1) * scale
    if "dustbin" in options:
        options["dustbin"] = Dustbin(0.2, 0.1, 0.3, row_capacity=5.0 * scale, col_capacity=5.0 * scale)
    return problems.Call(0, *leaves, None, options, leaves)


@pytest.mark.parametrize("engine", [*ENGINES, "reference"])
@pytest.mark.parametrize("name", slow_after(3, OPTIONS))
def test_a_balanced_problem_does_not_depend_on_the_unit(name: str, engine: str) -> None:
    truth = results(call(name, OPTIONS[name], 1.0), "reference")
    for dtype, scales in SCALES.items():
        tolerance = 1e-9 if dtype == D else 1e-4 if name != "implicit" else 1e-2
        for scale in scales:
            for key, x in results(call(name, OPTIONS[name], scale, dtype), engine).items():
                if key == "output" or (key.startswith("gradient") and "dustbin" not in name):
                    assert relative_error(x.double(), truth[key], 1e-2) < tolerance, (key, scale, dtype)


def in_the_callers_unit(monkeypatch: pytest.MonkeyPatch, problem: problems.Call) -> dict[str, Tensor]:
    """By the definition, without any other unit."""
    with monkeypatch.context() as patch:
        patch.setattr(arguments, "find_scale", lambda *_: None)
        return results(problem, "reference")


@pytest.mark.parametrize("scale", [1.0, 2e-4, 3e7])
@pytest.mark.parametrize("name", slow_after(5, [*OPTIONS, *(f"relaxed {name}" for name in RELAXED)]))
def test_everything_comes_back_in_the_callers_unit(name: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result and gradient of the definition as it stands, potentials and residuals too, by every engine."""
    relaxed = name.startswith("relaxed ")
    options = RELAXED[name.removeprefix("relaxed ")] if relaxed else OPTIONS[name]
    if "over_relaxation" in options and not relaxed:  # which begins from 0 in the unit of the problem
        options = options | {"over_relaxation": 1.0}
    problem = call(name, options, scale)
    truth = in_the_callers_unit(monkeypatch, problem)
    monkeypatch.setattr(mass_scale, "COMFORT", -1)
    for engine in (*ENGINES, "reference"):
        for key, x in results(problem, engine).items():
            error = float((x - truth[key]).norm()) / max(float(truth[key].norm()), scale if "residual" in key else 1e-9)
            assert error < 1e-9, (key, engine, error)


@pytest.mark.parametrize("engine", [*ENGINES, "reference"])
@pytest.mark.parametrize("name", ["both", "rows", "columns"])
def test_relaxed_problems_of_hardly_any_mass(name: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = in_the_callers_unit(monkeypatch, call(name, RELAXED[name], 1e-37))
    set_checks("auto" if name == "both" else "never")  # a side that is balanced has room for a unit unseen
    for key, x in results(call(name, RELAXED[name], 1e-37, torch.float32), engine).items():
        if "plan" not in key and "residual" not in key:
            assert relative_error(x.double(), truth[key], 1e-2) < 1e-4, key


@pytest.mark.parametrize("engine", [*ENGINES, "reference"])
@pytest.mark.parametrize("dtype, decades", [(torch.float32, 12), (torch.float32, 45), (D, 12), (D, 200)])
def test_masses_over_many_decades(engine: str, dtype: torch.dtype, decades: int) -> None:
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, 1, 24, 4, generator=g, dtype=D) for _ in range(3)]
    for top in (0, -decades):
        mass = torch.logspace(top, top - decades if top == 0 else 0, 24, dtype=D)
        truth = sinkhorn_attention(*leaves, row_mass=mass, base_iters=3, engine="tiled")
        out = sinkhorn_attention(*(x.to(dtype) for x in leaves), row_mass=mass, base_iters=3, engine=engine)
        rows = (out.double() - truth).norm(dim=-1) / truth.norm(dim=-1)  # those of hardly any mass count as much
        assert rows.max() < (1e-9 if dtype == D else 1e-4)


def test_masses_too_far_apart_for_the_dtype_are_refused() -> None:
    x = torch.randn(1, 3, 2)
    mass = torch.tensor([1.0, 1e-50, 1.0], dtype=D)
    with pytest.raises(ValueError, match=r"Masses of batch 0, head 0 span 1e-50 to 1, more than torch.float32 can"):
        sinkhorn_attention(x, x, x, row_mass=mass)
    assert sinkhorn_attention(x.double(), x.double(), x.double(), row_mass=mass).isfinite().all()


@pytest.mark.parametrize("engine", [*ENGINES, "reference"])
@pytest.mark.parametrize("checks", ["never", "auto"])
@pytest.mark.parametrize(
    ("dustbin", "sides"),
    [(None, ("row_mass",)), (None, ("row_mass", "col_mass")), (Dustbin(0.2, 0.1), ("row_mass", "col_mass"))],
)
def test_sums_of_the_largest_masses_do_not_overflow(
    dustbin: Dustbin | None, sides: tuple[str, ...], checks: str, engine: str
) -> None:
    """Nor where no data may be looked at."""
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    set_checks(checks)
    try:
        expected, found = (
            sinkhorn_attention(q, k, v, engine=engine, dustbin=dustbin, **{side: torch.full((8,), x) for side in sides})
            for x in (1.0, 3e38)
        )
    finally:
        set_checks("auto")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_programs_take_the_unit_too() -> None:
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    mass = torch.full((8,), 1e-39, dtype=D)

    def attention(mass: Tensor) -> Tensor:
        return sinkhorn_attention(q, k, v, row_mass=mass)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(mass), sinkhorn_attention(q, k, v, row_mass=torch.ones(8)), atol=1e-5)


def test_a_certificate_is_in_the_callers_unit() -> None:
    q, k = (torch.randn(1, 6, 4, dtype=D) for _ in range(2))
    for options in ({}, {"relaxation": 1.0}):
        scale = 1e12 if options else 1e-12
        mass = torch.linspace(1, 2, 6, dtype=D) * scale
        found = certify(q, k, row_mass=mass, col_mass=mass.flip(0), base_iters=2, **options)
        plan = sinkhorn_plan(q, k, row_mass=mass, col_mass=mass.flip(0), base_iters=2, **options)
        assert torch.allclose(found.row_residual_l1, (plan.sum(-1) - mass).abs().sum(-1), atol=1e-9 * scale)
        assert torch.allclose(found.col_residual_max, (plan.sum(-2) - mass.flip(0)).abs().amax(-1), rtol=1e-9)
