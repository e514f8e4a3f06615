"""The CPU engine's own promises: the same bits for any number of threads and any budget, linear memory, every
instruction set, scalings that leave the safe range, and a clear word where it is missing."""

from __future__ import annotations

import os
import subprocess
import sys

import problems
import pytest
import torch
from conformance import ENGINES, assert_agrees, relative_error, results
from marks import slow_after
from test_conformance import CORNERS, call_of

from torch_sinkhorn_attn import Dustbin, engines, sinkhorn_attention
from torch_sinkhorn_attn.engines import choose, cpu
from torch_sinkhorn_attn.problem.arguments import prepare


def workspace() -> int:
    """Bytes the last call took beside its results."""
    return torch.ops.torch_sinkhorn_attn.cpu_last_workspace()


def call(length: int, size: int, heads: int = 1, key_heads: int = 1, dtype=torch.float32, **options) -> problems.Call:
    g = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, h, n, 12, generator=g, dtype=dtype).requires_grad_()
        for h, n in ((heads, length), (key_heads, size), (key_heads, size))
    )
    mask = options.pop("mask", None)
    if isinstance(mask, tuple):
        mask = torch.randn(mask, generator=g, dtype=dtype).requires_grad_()
    leaves = [query, key, value] + ([mask] if mask is not None and mask.requires_grad else [])
    options["enable_gqa"] = heads != key_heads
    return problems.Call(0, query, key, value, mask, options, leaves)


# Problems long enough to be shared by the threads, and some to be worked on side by side.
LARGE = {
    "full": call(500, 430),
    "one to a thread": call(150, 140, heads=6, key_heads=2),
    "band": call(900, 900, window=(150, 150)),
    "implicit": call(400, 400, gradient="implicit", epsilon=2.0),
    "dustbin": call(400, 420, dustbin=Dustbin(0.5, torch.tensor(0.3))),
    "dropout": call(400, 400, dropout_p=0.2),
    "learned mask": call(380, 400, heads=2, key_heads=1, mask=(1, 2, 380, 400)),
    "learned key bias": call(380, 400, heads=2, key_heads=1, mask=(400,)),
    "learned row bias": call(380, 400, mask=(1, 380, 1)),
    "lengths": call(500, 500, query_lengths=torch.tensor([500, 90]), key_lengths=torch.tensor([450, 500])),
    "segments": call(
        600, 600, query_segment_ids=torch.arange(600) // 250, key_segment_ids=torch.arange(600) // 250, window=(90, 90)
    ),
    "relaxed": call(400, 400, relaxation=(1.0, 2.0)),
    "over-relaxed": call(400, 400, over_relaxation=1.4),
    "accelerated": call(400, 400, acceleration="chebyshev"),
}


def all_results(problem: problems.Call) -> dict[str, torch.Tensor]:
    return results(problem, "cpu")


@pytest.mark.parametrize("name", LARGE)
def test_bitwise_equal_for_any_number_of_threads(name: str) -> None:
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(all_results(LARGE[name]))
    for other in found[1:]:
        assert all(torch.equal(x, other[key]) for key, x in found[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_large_problems_agree_with_the_definition(name: str) -> None:
    """Several blocks and parts, which the random problems of the suite are too small for."""
    single = LARGE[name]
    double = problems.Call(0, *(x.detach().double().requires_grad_() for x in single.leaves[:3]), None, single.options)
    double.leaves = [double.query, double.key, double.value]
    if single.mask is not None:
        double.mask = single.mask.detach().double().requires_grad_()
        double.leaves.append(double.mask)
    assert_agrees(double, "cpu")


@pytest.mark.parametrize("name", LARGE)
def test_the_budget_does_not_change_a_bit(name: str) -> None:
    whole = all_results(LARGE[name])
    for budget in (0, 200_000):  # nothing kept; some of the tiles kept
        cpu.set_workspace_budget(budget)
        assert all(torch.equal(x, whole[key]) for key, x in all_results(LARGE[name]).items())


@pytest.mark.slow
@pytest.mark.parametrize("capability", slow_after(1, cpu.capabilities()))
def test_every_instruction_set(capability: str) -> None:
    cpu.set_capability(capability)
    assert cpu.capability() == capability
    for seed in range(2000, 2060):
        assert_agrees(problems.make(seed), "cpu")
    for name in ("primes", "huge epsilon", "tiny epsilon", "zero lengths"):
        assert_agrees(CORNERS[name], "cpu")


def test_streaming_random_problems() -> None:
    cpu.set_workspace_budget(0)
    for seed in range(2100, 2160):
        assert_agrees(problems.make(seed), "cpu")


@pytest.mark.slow
def test_the_variable_chooses_the_instruction_set() -> None:
    program = "from torch_sinkhorn_attn.engines import cpu; print(cpu.capability())"

    def run(name: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"TORCH_SINKHORN_ATTN_CPU_CAPABILITY": name}
        return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)

    assert run("default").stdout.strip() == "default"
    wrong = run("sse9")
    assert wrong.returncode != 0
    assert "TORCH_SINKHORN_ATTN_CPU_CAPABILITY='sse9' is not usable on this processor" in wrong.stderr


@pytest.mark.slow
def test_the_variable_sets_the_budget() -> None:
    program = "from torch_sinkhorn_attn.engines import cpu; print(cpu.workspace_budget())"

    def run(mebibytes: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"TORCH_SINKHORN_ATTN_CPU_WORKSPACE_MIB": mebibytes}
        return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)

    assert [int(run(x).stdout) for x in ("3", "0", "")] == [3 << 20, 0, cpu.DEFAULT_BUDGET]
    assert "TORCH_SINKHORN_ATTN_CPU_WORKSPACE_MIB='-1' must be a whole number of MiB" in run("-1").stderr


def test_bad_settings_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"capability='sse9' is not usable on this processor; choose one of \['default'"
    ):
        cpu.set_capability("sse9")
    with pytest.raises(ValueError, match="num_bytes=-1 must be 0 or more"):
        cpu.set_workspace_budget(-1)
    with pytest.raises(ValueError, match=r"must be less than 2\*\*62"):
        cpu.set_workspace_budget(1 << 62)


@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0, 100.0])
@pytest.mark.parametrize(
    "options", [{}, {"window": (8, 8)}, {"dustbin": Dustbin(0.0, 1.0)}, {"relaxation": (None, 2.0)}], ids=str
)
def test_scalings_beyond_the_safe_range_are_absorbed(scale: float, options: dict) -> None:
    """Scores whose potentials move by far more than 20 (float32) and 200 (float64) from one iteration to the next."""
    g = torch.Generator().manual_seed(1)
    tensors = [torch.randn(1, 2, 40, 6, generator=g, dtype=torch.float64) for _ in range(3)]
    tensors[0] *= scale
    problem = problems.Call(1, *(x.requires_grad_() for x in tensors), None, {"base_iters": 7, **options})
    problem.leaves = tensors
    assert_agrees(problem, "cpu", tolerance=1e-9, plan=False)
    truth = results(problem, "reference", plan=False)
    single = problems.Call(1, *(x.detach().float().requires_grad_() for x in tensors), None, problem.options)
    single.leaves = [single.query, single.key, single.value]
    plain, found = results(single, "reference", plan=False), results(single, "cpu", plan=False)
    for name, y in truth.items():
        assert torch.isfinite(found[name]).all()
        if "residual" not in name:
            allowed = (3 if "gradient" in name else 2) * relative_error(plain[name].double(), y) + 2e-6
            assert relative_error(found[name].double(), y) <= allowed, name


def test_tiny_and_huge_masses() -> None:
    mass = torch.logspace(-12, 2, 30, dtype=torch.float64)
    for options in ({"row_mass": mass}, {"col_mass": mass}, {"row_mass": mass, "col_mass": mass.flip(0)}):
        assert_agrees(call_of(3, 1, 1, 30, 30, 4, **options), "cpu", tolerance=1e-9)


def test_memory_is_linear_in_a_band_and_bounded_by_the_budget() -> None:
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)

    def taken(length: int, **options) -> int:
        q, k, v = (torch.randn(1, length, 16, generator=g).requires_grad_() for _ in range(3))
        out = sinkhorn_attention(q, k, v, base_iters=1, engine="cpu", **options)
        forward = workspace()
        out.sum().backward()
        return max(forward, workspace())

    small, large = taken(2048, window=(64, 64)), taken(4096, window=(64, 64))
    assert large < 2.05 * small
    cpu.set_workspace_budget(1 << 20)
    limited = taken(2048), taken(4096)
    assert limited[1] < 2.05 * limited[0] + (1 << 20)
    assert limited[1] < 4096 * 4096  # bytes: a quarter of the plan


def test_half_precision_numbers_are_read_exactly() -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = bits.view(dtype)
        values = values[values.isfinite() & (values.abs() < 1e4)].view(1, 1, -1, 1)
        out = sinkhorn_attention(
            torch.zeros(1, 1, values.shape[2], 1, dtype=dtype), torch.zeros_like(values), values,
            window=(0, 0), base_iters=0, tail_iters=0, engine="cpu",
        )  # fmt: skip
        assert torch.equal(out, values)


def test_it_is_what_engine_none_takes() -> None:
    prepared = prepare(*(torch.randn(1, 4, 3) for _ in range(3)))
    assert list(engines.ENGINES) == ["cpu", "triton", "xla", "torchtpu", "tiled"]
    assert choose(None, prepared.inputs, prepared.problem) == "cpu"


def test_a_missing_library_is_said_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_unavailable", "no compiler was found")
    q = torch.randn(1, 5, 3)
    assert torch.equal(sinkhorn_attention(q, q, q), sinkhorn_attention(q, q, q, engine="tiled"))
    with pytest.raises(ValueError, match=r"engine='cpu' cannot run this problem. cpu: no compiler was found"):
        sinkhorn_attention(q, q, q, engine="cpu")
    with pytest.raises(RuntimeError, match=r"engine='cpu' is not available: no compiler was found"):
        cpu.capability()


@pytest.mark.slow
def test_the_engines_say_what_they_are() -> None:
    command = [sys.executable, "-m", "torch_sinkhorn_attn.engines"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[0] for line in said] == ["cpu", "triton", "xla", "torchtpu", "tiled", "reference"]
    assert f"{cpu.capability()} (of default" in said[0]


def test_other_devices_are_refused_with_the_reason() -> None:
    q = torch.randn(1, 5, 3, device="meta")
    with pytest.raises(ValueError, match=r"cpu: it runs on CPU tensors, and query is on meta"):
        sinkhorn_attention(q, q, q, engine="cpu")


# What a review found: each of these was wrong once.


def agrees_in_float32(tensors: list[torch.Tensor], mask: torch.Tensor | None = None, **options) -> None:
    """Within 2x (values) and 3x (gradients) of plain float32, plus rounding, of the definition in float64."""

    def run(engine: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        cast = None if mask is None else mask.to(dtype)
        if cast is not None and mask.requires_grad:
            leaves.append(cast := cast.detach().requires_grad_())
        return results(problems.Call(0, *leaves[:3], cast, options, leaves), engine, plan=False)

    truth, plain = run("reference", torch.float64), run("reference", torch.float32)
    for name, x in run("cpu", torch.float32).items():
        assert torch.isfinite(x).all(), name
        if "residual" not in name:
            allowed = (3 if "gradient" in name else 2) * relative_error(plain[name].double(), truth[name]) + 2e-6
            assert relative_error(x.double(), truth[name]) <= allowed, name


def gaussians(*shape: int, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("low", [-50.0, -200.0, -1e3])
@pytest.mark.parametrize("relaxation", [1.0, (1.0, None), (None, 1.0)])
def test_a_relaxed_token_whose_mass_vanishes_takes_nobody_with_it(low: float, relaxation) -> None:
    mask = torch.zeros(24, 24, dtype=torch.float64)
    mask[5] = low
    tensors = gaussians(1, 24, 4)
    agrees_in_float32(tensors, mask, relaxation=relaxation)
    leaves = [x.requires_grad_() for x in tensors]
    assert_agrees(problems.Call(0, *leaves, mask, {"relaxation": relaxation}, leaves), "cpu")


def test_the_smallest_masses_stay_finite() -> None:
    mass = torch.ones(16)
    mass[4] = 3e-38
    for options in ({}, {"dustbin": Dustbin(0.0, 0.0)}, {"relaxation": (1.0, None)}):
        q, k, v = (x.float() for x in gaussians(1, 16, 4))
        out = sinkhorn_attention(q, k, v, row_mass=mass, engine="cpu", **options)
        truth = sinkhorn_attention(q, k, v, row_mass=mass, engine="reference", **options)
        others = torch.arange(16) != 4
        assert torch.isfinite(out).all()
        assert relative_error(out[:, others], truth[:, others]) < 1e-5


@pytest.mark.parametrize("options", [{}, {"base_iters": 0, "tail_iters": 0}, {"dustbin": Dustbin(0.0, 0.0)}])
def test_nan_is_not_swallowed(options: dict) -> None:
    for which in range(2):
        tensors = [x.float() for x in gaussians(1, 40, 4)]
        tensors[which][0, 3, 1] = torch.nan
        assert sinkhorn_attention(*tensors, engine="cpu", **options).isnan().any()
    tensors = [x.float() for x in gaussians(1, 40, 4)]
    tensors[1][0, 3, 1] = torch.nan
    assert sinkhorn_attention(*tensors, engine="cpu", **options).isnan().all()


def test_dustbin_sums_are_as_exact_as_plain_ones() -> None:
    for seed in range(3):
        agrees_in_float32(gaussians(1, 1, 300, 8, seed=seed), dustbin=Dustbin(0.5, 0.3))


def test_the_gradient_of_a_mask_of_rows_is_as_exact_as_plain_ones() -> None:
    mask = torch.randn(8, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    query, (_, key, value) = gaussians(1, 8, 4)[0], gaussians(1, 8000, 4, seed=1)
    agrees_in_float32([query, key, value], mask, relaxation=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", slow_after(1, [(1, 1, 2), (1, 2, 2), (1, 3, 2)]))
def test_conjugate_gradients_stop_at_rounding(shape: tuple[int, ...], engine: str, dtype: torch.dtype) -> None:
    """Small systems whose right-hand side is all rounding, or whose directions drift into a null vector."""
    for seed in range(120):
        query, key, value = (x.to(dtype).requires_grad_() for x in gaussians(*shape, seed=seed))
        out = sinkhorn_attention(
            query, key, value, gradient="implicit", epsilon=0.5, base_iters=2, tail_iters=3, engine=engine
        )
        found = torch.autograd.grad(out.sin().sum(), (query, key))
        assert max(float(x.abs().max()) for x in found) < 100


def test_a_short_packed_segment_does_not_explode_beside_a_long_one() -> None:
    ids = torch.tensor([0] * 1 + [1] * 20)
    leaves = [x.requires_grad_() for x in gaussians(1, 21, 3, seed=5)]
    options = {"query_segment_ids": ids, "key_segment_ids": ids, "gradient": "implicit", "base_iters": 5}
    for engine in ENGINES:
        assert_agrees(problems.Call(0, *leaves, None, options, leaves), engine, tolerance=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("tail_iters", [0, 2])
def test_tolerance_is_looked_at_beyond_the_safe_range_too(tail_iters: int) -> None:
    """A column whose scaling crosses e^20 by a small step, or is beyond it from the first."""
    for seed in range(12):
        tensors = [1.5 * x.float() for x in gaussians(1, 8, 4, seed=seed)]
        mask = torch.zeros(8, 8)
        for low in torch.arange(19.0, 24.0, 0.25):
            mask[:, 3] = -low
            out, truth = (
                sinkhorn_attention(*tensors, mask, base_iters=50, tolerance=0.1, tail_iters=tail_iters, engine=engine)
                for engine in ("cpu", "reference")
            )
            assert relative_error(out, truth) < 1e-4, (seed, low)


@pytest.mark.parametrize("tail_iters", [0, 2])
@pytest.mark.parametrize("options", [{}, {"dustbin": Dustbin(0.0, 0.0)}])
def test_a_warm_start_far_from_the_centre_costs_no_digits(options: dict, tail_iters: int) -> None:
    extra = int("dustbin" in options)
    start = torch.full((1, 40 + extra), 1000.0), torch.full((1, 40 + extra), -1000.0)
    agrees_in_float32(gaussians(1, 40, 4), initial_potentials=start, tail_iters=tail_iters, **options)
