"""The half-steps of a rank by the C++ kernels, on a group of one; tests/distributed has several ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import problems
import pytest
import torch
import torch.distributed as dist
from conformance import assert_agrees, relative_error, results
from test_conformance import CORNERS, call_of

from torch_sinkhorn_attn import Dustbin, sinkhorn_attention
from torch_sinkhorn_attn.engines import cpu, cpu_ranks
from torch_sinkhorn_attn.problem.arguments import prepare


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shared(call: problems.Call) -> problems.Call:
    return replace(call, options=call.options | {"sequence_group": dist.group.WORLD})


def agrees(call: problems.Call, tolerance: float = 1e-10) -> None:
    assert_agrees(shared(call), "cpu", tolerance, results(call, "reference", plan=False), plan=False)


def random(length: int, size: int, dtype: torch.dtype, scale: float = 1.0, **options: Any) -> problems.Call:
    g = torch.Generator().manual_seed(1)
    tensors = [torch.randn(1, 2, n, 6, generator=g, dtype=torch.float64) for n in (length, size, size)]
    tensors[0] *= scale
    tensors = [x.to(dtype).requires_grad_() for x in tensors]
    return problems.Call(1, *tensors, None, options, tensors)


@pytest.mark.parametrize("name", CORNERS)
def test_corners(name: str) -> None:
    agrees(CORNERS[name])


@pytest.mark.parametrize("seed", range(3000, 3024))
def test_random_problems(seed: int) -> None:
    agrees(problems.make(seed))


@pytest.mark.parametrize("budget", [0, 20_000])
def test_tiles_made_again_in_each_pass_give_the_same_bits(budget: int) -> None:
    for options in ({"window": (30, 30)}, {"gradient": "implicit"}, {"dropout_p": 0.2}):
        call = shared(random(150, 150, torch.float32, **options))
        whole = results(call, "cpu", plan=False)
        cpu.set_workspace_budget(budget)
        assert all(torch.equal(x, whole[name]) for name, x in results(call, "cpu", plan=False).items())
        cpu.set_workspace_budget(cpu.DEFAULT_BUDGET)


def test_bitwise_equal_for_any_number_of_threads() -> None:
    call, found = shared(random(500, 430, torch.float32)), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(results(call, "cpu", plan=False))
    assert all(torch.equal(x, other[name]) for other in found[1:] for name, x in found[0].items())


@pytest.mark.parametrize("capability", cpu.capabilities())
def test_every_instruction_set(capability: str) -> None:
    cpu.set_capability(capability)
    for length in (1, 7, 8, 9, 31, 33, 65):
        agrees(random(length, length + 1, torch.float64))


OPTIONS: list[dict[str, Any]] = [{}, {"window": (8, 8)}, {"dustbin": Dustbin(0.0, 1.0)}, {"relaxation": (None, 2.0)}]


@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0, 100.0])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_scalings_beyond_the_safe_range(scale: float, options: dict[str, Any]) -> None:
    """Potentials that move by far more than tiles allow, from one iteration to the next."""
    options = {"base_iters": 7, **options}
    double, single = (random(40, 40, dtype, scale, **options) for dtype in (torch.float64, torch.float32))
    agrees(double, 1e-9)
    truth, plain = results(double, "reference", plan=False), results(single, "reference", plan=False)
    for name, x in results(shared(single), "cpu", plan=False).items():
        assert torch.isfinite(x).all()
        if "residual" not in name:
            allowed = (3 if "gradient" in name else 2) * relative_error(plain[name].double(), truth[name]) + 2e-6
            assert relative_error(x.double(), truth[name]) <= allowed, name


def test_tiny_and_huge_masses() -> None:
    mass = torch.logspace(-12, 2, 30, dtype=torch.float64)
    for options in ({"row_mass": mass}, {"col_mass": mass}, {"row_mass": mass, "col_mass": mass.flip(0)}):
        agrees(call_of(3, 1, 1, 30, 30, 4, **options), 1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_compute_in_float32(dtype: torch.dtype) -> None:
    half = random(40, 40, dtype, window=(9, 9))
    wide = random(40, 40, dtype, window=(9, 9))
    wide.leaves = [x.detach().double().requires_grad_() for x in wide.leaves]
    wide.query, wide.key, wide.value = wide.leaves
    truth = results(wide, "reference", plan=False)
    for name, x in results(shared(half), "cpu", plan=False).items():
        assert "residual" in name or relative_error(x.double(), truth[name]) < 3e-2, name


@pytest.mark.parametrize("which", range(3))
def test_nan_is_not_swallowed(which: int) -> None:
    call = random(40, 40, torch.float32)
    tensors = [x.detach() for x in call.leaves]
    tensors[which][0, 0, 3, 1] = torch.nan
    found = sinkhorn_attention(*tensors, engine="cpu", sequence_group=dist.group.WORLD)
    truth = sinkhorn_attention(*tensors, engine="tiled")
    assert found.isnan().any() and torch.equal(found.isnan(), truth.isnan())


def test_negated_views_are_read_with_their_sign() -> None:
    tensors = [x.detach() for x in random(12, 12, torch.float64).leaves]
    truth = sinkhorn_attention(*(-x for x in tensors), engine="reference")
    views = [torch._neg_view(x) for x in tensors]
    torch.testing.assert_close(sinkhorn_attention(*views, engine="cpu", sequence_group=dist.group.WORLD), truth)


def kernels(dtype: torch.dtype = torch.float64) -> tuple[cpu_ranks.Kernels, torch.Tensor]:
    """Those of a small problem, and its scores."""
    call = random(20, 24, dtype)
    given = prepare(*(x.detach() for x in call.leaves))
    scores = given.inputs.query @ given.inputs.key.mT * given.problem.solver.scale
    return cpu_ranks.Kernels(given.inputs, given.problem, (0, 0)), scores


def test_an_interrupted_absorption_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """From scores, of which the first call has overwritten some."""
    found, scores = kernels()
    u, v, flags = scores.new_zeros(1, 2, 20), scores.new_zeros(1, 2, 24), []
    found.col_lse(u)
    op = found._op

    def interrupted(verb: str, vectors: dict[str, torch.Tensor], flag: bool) -> list[torch.Tensor]:
        done = op(verb, vectors, flag)
        flags.append(flag)
        if len(flags) == 1:
            raise RuntimeError(cpu.INTERRUPTED)
        return done

    with monkeypatch.context() as patch:
        patch.setattr(found, "_op", interrupted)
        found.absorb(u, v)
    assert flags == [True, False]
    torch.testing.assert_close(found.row_sums(torch.ones_like(v)), scores.exp().sum(-1))


def test_tiles_are_made_of_scores_however_often() -> None:
    found, scores = kernels()
    u, v = torch.linspace(-1, 1, 40).view(1, 2, 20).double(), torch.linspace(1, 0, 48).view(1, 2, 24).double()
    found.col_lse(u)
    for factor in (0.0, 1.0, 2.0):
        found.absorb(factor * u, factor * v)
        plan = (scores + factor * (u[..., None] + v[..., None, :])).exp()
        torch.testing.assert_close(found.row_sums(torch.ones_like(v)), plan.sum(-1))
        torch.testing.assert_close(found.col_sums(torch.ones_like(u)), plan.sum(-2))


def test_the_scalings_that_tiles_are_read_with() -> None:
    """Half-steps are taken from tiles until a row's scaling leaves its range, and then from the scores."""
    found, scores = kernels(torch.float32)
    plan = torch.zeros(1, 2, 20)
    lse = found.col_lse(plan)
    found.absorb(plan, -lse, normalised=True)
    at = found.absorbed
    assert at is not None
    for moved, safe in ((19.0, True), (21.0, False), (-21.0, False), (torch.nan, False)):
        u = plan.clone()
        u[0, 1, 4] = moved
        x = at.rows(u)
        assert (x is not None) == safe
        far = at.beta + moved
        assert (at.cols(far) is not None) == (moved < 10)
        if x is not None:
            torch.testing.assert_close(found.col_sums(x).log() - at.beta, (scores + u[..., None]).logsumexp(-2))


@pytest.mark.parametrize(
    "options, swept",
    [
        ({}, 6),
        ({"window": (9, 9)}, 6),
        ({"acceleration": "chebyshev"}, 6),
        ({"over_relaxation": 1.2}, 0),
        ({"relaxation": (2.0, None)}, 0),
        ({"dustbin": Dustbin(0.0, 0.0)}, 0),
    ],
    ids=str,
)
def test_a_stopped_iteration_reads_the_tiles_once(
    options: dict[str, Any], swept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    verbs, op = [], cpu_ranks.Kernels._op

    def counted(self: Any, verb: str, *arguments: Any) -> list[torch.Tensor]:
        verbs.append(verb)
        return op(self, verb, *arguments)

    monkeypatch.setattr(cpu_ranks.Kernels, "_op", counted)
    call = shared(random(40, 40, torch.float64, base_iters=6, tail_iters=2, **options))
    results(call, "cpu", plan=False)
    forward = verbs[: verbs.index("values") + 1]
    assert forward.count("sweep") == swept and forward.count("col_lse") == 1 and "row_lse" not in forward
    # Columns of the first iteration are of scores; then 5 stopped ones, 2 kept ones, and the residuals.
    assert forward.count("col_sums") == (3 if swept else 8)


def plan_of(call: problems.Call, monkeypatch: pytest.MonkeyPatch) -> cpu_ranks.SharedKernels:
    """That of the forward of a call on the group."""
    plans, begin = [], cpu_ranks.SharedKernels.__init__
    with monkeypatch.context() as patch:
        patch.setattr(
            cpu_ranks.SharedKernels, "__init__", lambda self, *given: (begin(self, *given), plans.append(self))[0]
        )
        results(shared(call), "cpu", plan=False)
    return plans[0]


def test_a_row_without_pairs_is_found_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    call = random(12, 14, torch.float64, relaxation=1.0)
    call.mask = torch.ones(12, 14, dtype=torch.bool)
    call.mask[3] = False
    plan, u, v, asked = plan_of(call, monkeypatch), torch.zeros(1, 2, 12), torch.zeros(1, 2, 14), []
    plan.unsupported = torch.zeros_like(plan.unsupported)
    row_lse = plan.kernels.row_lse
    monkeypatch.setattr(plan.kernels, "row_lse", lambda v: (asked.append(v), row_lse(v))[1])
    for _ in range(3):
        plan.real_column_lse(u.double())
        assert (plan.real_row_lse(v.double()) == -torch.inf).nonzero()[:, -1].tolist() == [3, 3]
    assert len(asked) == 1


def test_columns_are_summed_by_tiles_of_their_own_scale_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a plan that is next to nothing here tell no logarithm of its columns."""
    plan = plan_of(random(12, 14, torch.float32), monkeypatch)
    u, v = torch.zeros(1, 2, 12), torch.full((1, 2, 14), -300.0)
    expected = plan.kernels.col_lse(u)
    plan.kernels.absorb(u, v)
    assert (plan.kernels.col_sums(torch.ones_like(u)) == 0).all()
    torch.testing.assert_close(plan.real_column_lse(u), expected)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "verb": ({"verb": "rows"}, "verb is 'rows'; one of pack, row_lse"),
    "state": ({"state": torch.zeros(8, dtype=torch.uint8)}, r"state is .*\[8\]; \d+ bytes of uint8"),
    "state's dtype": ({"state": torch.zeros(1 << 20)}, "bytes of uint8 are needed"),
    "no vector": ({"v": None}, "v is missing"),
    "short vector": ({"v": torch.zeros(1, 2, 3)}, r"v is float32\[1, 2, 3\]; float32\[1, 2, 24\]"),
    "other dtype": ({"v": torch.zeros(1, 2, 24, dtype=torch.float64)}, "v is float64"),
    "places": ({"first": [0, -1]}, "first holds -1"),
    "few places": ({"first": [0]}, "and 1 places"),
    "few vectors": ({"vectors": []}, "got 0 vectors"),
    "terms": ({"verb": "score_gradients", "row_terms": torch.zeros(1, 2, 20, 0)}, "and a term are needed"),
    "other terms": ({"verb": "score_gradients", "col_terms": torch.zeros(1, 2, 24, 2)}, "col_terms is float32"),
    "output": ({"verb": "value_gradient", "output": torch.zeros(1)}, r"output is float32\[1\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_calls_that_do_not_fit_are_refused(name: str) -> None:
    changed, message = WRONG[name]
    found, _ = kernels(torch.float32)
    lines = {"u": (20,), "v": (24,), "x": (20,), "y": (24,), "row_terms": (20, 1), "col_terms": (24, 1)}
    vectors = {name: torch.zeros(1, 2, *shape) for name, shape in lines.items()}
    vectors |= {name: torch.zeros(1, 2, 20, 6) for name in ("grad", "output")}
    vectors |= {x: y for x, y in changed.items() if x in cpu_ranks.VECTORS}
    given = changed.get("vectors", [vectors[x] for x in cpu_ranks.VECTORS])
    state, verb, first = changed.get("state", found.state), changed.get("verb", "absorb"), changed.get("first", [0, 0])
    with pytest.raises(ValueError, match=message):
        torch.ops.torch_sinkhorn_attn.cpu_rank(state, verb, given, first, False, *found.arguments)


def test_what_ranks_have_not_is_refused() -> None:
    given = prepare(*(torch.randn(1, 8, 4) for _ in range(3)), dustbin=Dustbin(0.0, 0.0))
    state, problem = torch.zeros(1 << 20, dtype=torch.uint8), cpu.arguments(given.inputs, given.problem)
    with pytest.raises(ValueError, match="of real pairs and of intervals alone"):
        torch.ops.torch_sinkhorn_attn.cpu_rank(state, "pack", [None] * 8, [0, 0], False, *problem)
