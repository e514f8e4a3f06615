"""Values of the transport problem, against a dense solver in the form f, g that shares nothing with the package."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from conformance import ENGINES, relative_error
from torch import Tensor

from torch_sinkhorn_attn import Dustbin, sinkhorn_cost, sinkhorn_plan, squared_distance_features

D = torch.float64
EPSILON = 0.7


class Truth(NamedTuple):
    primal: Tensor
    held: Tensor  # the primal of a plan that is held: its gradient is the envelope's
    linear: Tensor
    dual: Tensor


def dense(
    scores: Tensor, a: Tensor, b: Tensor, tau: tuple[float | None, float | None], base: int, tail: int,
    epsilon: float = EPSILON,
) -> Truth:  # fmt: skip
    """Columns first, rows last; the `tail` last iterations are differentiated. Scores of -inf are off the support."""
    row, col = (1.0 if t is None else t / (t + epsilon) for t in tau)
    log_a, log_b = a.log(), b.log()
    f = torch.zeros_like(a) if tau != (None, None) else -epsilon * log_a  # attention starts from u = 0
    for i in range(base + tail):
        with torch.set_grad_enabled(i >= base):
            g = -col * epsilon * torch.logsumexp((f[..., :, None] + scores) / epsilon + log_a[..., :, None], -2)
            f = -row * epsilon * torch.logsumexp((g[..., None, :] + scores) / epsilon + log_b[..., None, :], -1)
    product = a[..., :, None] * b[..., None, :]
    plan = product * ((f[..., :, None] + g[..., None, :] + scores) / epsilon).exp()

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        return p * (torch.where(p > 0, p, 1.0) / q).log() - p + q

    def value(plan: Tensor) -> tuple[Tensor, Tensor]:
        linear = -(plan * scores.masked_fill(scores == -torch.inf, 0.0)).sum((-1, -2))
        total = linear + epsilon * divergence(plan, product).sum((-1, -2))
        if tau[0] is not None:
            total = total + tau[0] * divergence(plan.sum(-1), a).sum(-1)
        if tau[1] is not None:
            total = total + tau[1] * divergence(plan.sum(-2), b).sum(-1)
        return total, linear

    dual = -epsilon * (plan - product).sum((-1, -2))
    for mass, potential, t in ((a, f, tau[0]), (b, g, tau[1])):
        dual = dual + (mass * potential if t is None else t * mass * (1 - (-potential / t).exp())).sum(-1)
    primal, linear = value(plan)
    return Truth(primal, value(plan.detach())[0], linear, dual)


def masses(*shape: int, balanced: bool = True) -> tuple[Tensor, Tensor]:
    a, b = torch.rand(*shape[:-2], shape[-2], dtype=D) + 0.5, torch.rand(*shape[:-2], shape[-1], dtype=D) + 0.5
    return a, b / b.sum(-1, keepdim=True) * a.sum(-1, keepdim=True) if balanced else b


def gradients(x: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(x.sum(), leaves, retain_graph=True))


def assert_is(cost: Any, truth: Truth, leaves: list[Tensor], gradient: str) -> None:
    for name in ("primal", "linear", "dual"):
        assert relative_error(getattr(cost, name), getattr(truth, name)) < 1e-10, name
    held = gradients(truth.held, leaves)
    wanted = {"dual": held, "primal": held if gradient == "envelope" else gradients(truth.primal, leaves)}
    if gradient != "envelope":
        wanted["linear"] = gradients(truth.linear, leaves)
    else:
        assert not cost.linear.requires_grad
    for name, expected in wanted.items():
        for x, y in zip(gradients(getattr(cost, name), leaves), expected, strict=True):
            assert relative_error(x, y) < 1e-9, name


TAUS = [(None, None), (1.5, 1.5), (None, 0.7), (2.0, None)]


@pytest.mark.parametrize("engine", ["reference", *ENGINES])
@pytest.mark.parametrize("gradient", ["envelope", "tail", "unrolled", "implicit"])
@pytest.mark.parametrize("tau", TAUS)
def test_values_and_gradients(tau: Any, gradient: str, engine: str) -> None:
    q, k = (torch.randn(2, 3, n, 4, dtype=D, requires_grad=True) for n in (7, 9))
    a, b = masses(2, 3, 7, 9, balanced=tau == (None, None))
    base = 300 if gradient == "implicit" else 4
    cost = sinkhorn_cost(
        q, k, gradient=gradient, epsilon=EPSILON, row_mass=a, col_mass=b, relaxation=tau, base_iters=base, engine=engine
    )
    tail = {"unrolled": base + 2, "implicit": 60}.get(gradient, 2)
    assert_is(cost, dense(q @ k.mT / 2, a, b, tau, base + 2 - tail, tail), [q, k], gradient)
    if gradient == "implicit":
        assert relative_error(cost.dual, cost.primal) < 1e-10


@pytest.mark.parametrize("engine", ["reference", *ENGINES])
@pytest.mark.parametrize("gradient", ["envelope", "tail"])
def test_scores_given_and_masks(gradient: str, engine: str) -> None:
    scores = torch.randn(2, 3, 6, 8, dtype=D, requires_grad=True)
    a, b = masses(2, 3, 6, 8, balanced=False)
    options: dict[str, Any] = {
        "epsilon": EPSILON, "row_mass": a, "col_mass": b, "relaxation": 1.5, "engine": engine, "gradient": gradient
    }  # fmt: skip
    truth = dense(scores, a, b, (1.5, 1.5), 20, 2)
    assert_is(sinkhorn_cost(scores, **options), truth, [scores], gradient)
    keep = torch.rand(2, 3, 6, 8) > 0.2
    truth = dense(scores.masked_fill(~keep, -torch.inf), a, b, (1.5, 1.5), 20, 2)
    assert_is(sinkhorn_cost(scores, attn_mask=keep, **options), truth, [scores], gradient)
    q, k = (torch.randn(2, 3, n, 4, dtype=D, requires_grad=True) for n in (6, 8))
    for shape in ((6, 8), (2, 1, 6, 8), (3, 1, 8), (2, 1, 6, 1), (1, 1)):
        mask = torch.randn(shape, dtype=D, requires_grad=True)
        truth = dense(q @ k.mT / 2 + EPSILON * mask, a, b, (1.5, 1.5), 20, 2)
        assert_is(sinkhorn_cost(q, k, mask, **options), truth, [q, k, mask], gradient)


@pytest.mark.parametrize("engine", ["reference", *ENGINES])
@pytest.mark.parametrize("gradient", ["envelope", "tail", "unrolled"])
def test_with_a_dustbin(gradient: str, engine: str) -> None:
    q, k = (torch.randn(2, 3, n, 4, dtype=D, requires_grad=True) for n in (5, 7))
    z = [torch.randn(x, dtype=D, requires_grad=True) for x in ((3, 5), (3, 1), (2, 3))]
    cost = sinkhorn_cost(q, k, dustbin=Dustbin(*z), epsilon=EPSILON, gradient=gradient, base_iters=4, engine=engine)
    column, row = z[0].expand(2, 3, 5)[..., None], z[1].expand(2, 3, 7)[..., None, :]
    scores = torch.cat([torch.cat([q @ k.mT / 2, column], -1), torch.cat([row, z[2][..., None, None]], -1)], -2)
    a, b = torch.ones(2, 3, 6, dtype=D), torch.ones(2, 3, 8, dtype=D)
    a[..., -1], b[..., -1] = 7.0, 5.0
    tail = 6 if gradient == "unrolled" else 2
    assert_is(cost, dense(scores, a, b, (None, None), 6 - tail, tail), [q, k, *z], gradient)


def test_a_dustbin_beside_relaxation() -> None:
    q, k = (torch.randn(1, 2, n, 4, dtype=D, requires_grad=True) for n in (5, 7))
    z = torch.tensor(0.3, dtype=D, requires_grad=True)
    scores = torch.cat([q @ k.mT / 2, z.expand(1, 2, 5, 1)], -1)
    scores = torch.cat([scores, z.expand(1, 2, 1, 8)], -2)
    a, b = torch.ones(1, 2, 6, dtype=D), torch.ones(1, 2, 8, dtype=D)
    a[..., -1], b[..., -1] = 3.0, 2.0
    bins = Dustbin(z, z, z, row_capacity=3.0, col_capacity=2.0)
    for tau in ((1.5, 1.5), (None, 0.7)):
        options = {"dustbin": bins, "epsilon": EPSILON, "relaxation": tau}
        truth = dense(scores, a, b, tau, 20, 2)
        assert_is(sinkhorn_cost(q, k, **options), truth, [q, k, z], "envelope")
        if tau[0] is None:
            assert_is(sinkhorn_cost(q, k, gradient="tail", **options), truth, [q, k, z], "tail")
    with pytest.raises(ValueError, match="envelope"):
        sinkhorn_cost(q, k, gradient="tail", dustbin=bins, relaxation=1.0)
    ids = torch.tensor([0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match="batch elements"):
        sinkhorn_cost(q, q, dustbin=Dustbin(0.0, 0.0), relaxation=1.0, query_segment_ids=ids, key_segment_ids=ids)


@pytest.mark.parametrize("engine", ["reference", *ENGINES])
def test_packed_problems_and_padding_are_added_up(engine: str) -> None:
    q, k = (torch.randn(1, 2, 9, 4, dtype=D) for _ in range(2))
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, -1])
    for extra in ({}, {"dustbin": Dustbin(0.2, 0.1)}, {"relaxation": 2.0}):
        packed = sinkhorn_cost(q, k, query_segment_ids=ids, key_segment_ids=ids, engine=engine, **extra)
        parts = [sinkhorn_cost(q[..., s, :], k[..., s, :], engine=engine, **extra) for s in (slice(3), slice(3, 8))]
        for x, y, z in zip(packed[:3], parts[0][:3], parts[1][:3], strict=True):
            assert relative_error(x, y + z) < 1e-11
        padded = sinkhorn_cost(q, k, query_lengths=torch.tensor([3]), key_lengths=torch.tensor([3]), **extra)
        for x, y in zip(padded[:3], parts[0][:3], strict=True):
            assert relative_error(x, y) < 1e-11


def test_grouped_queries() -> None:
    q, k = torch.randn(2, 4, 6, 3, dtype=D, requires_grad=True), torch.randn(2, 2, 5, 3, dtype=D, requires_grad=True)
    for gradient in ("envelope", "tail"):
        for relaxation in (None, 2.0):
            options = {"gradient": gradient, "relaxation": relaxation}
            cost = sinkhorn_cost(q, k, enable_gqa=True, **options)
            same = sinkhorn_cost(q, k.repeat_interleave(2, 1), **options)
            for x, y in zip(cost, same, strict=True):
                assert relative_error(x, y) < 1e-12
            for x, y in zip(gradients(cost.primal, [q, k]), gradients(same.primal, [q, k]), strict=True):
                assert relative_error(x, y) < 1e-12


@pytest.mark.parametrize("engine", ["reference", *ENGINES])
@pytest.mark.parametrize("tau", TAUS)
def test_masses_in_any_unit(tau: Any, engine: str) -> None:
    q, k = (torch.randn(1, 2, n, 4, dtype=D, requires_grad=True) for n in (5, 6))
    a, b = (1e-12 * x for x in masses(1, 2, 5, 6, balanced=tau == (None, None)))
    for gradient in ("envelope", "tail"):
        cost = sinkhorn_cost(
            q, k, gradient=gradient, epsilon=EPSILON, row_mass=a, col_mass=b, relaxation=tau, engine=engine
        )
        truth = dense(q @ k.mT / 2, a, b, tau, 20, 2)
        for name in ("primal", "linear", "dual"):
            assert abs(getattr(cost, name) / getattr(truth, name) - 1).max() < 1e-9
        for x, y in zip(gradients(1e12 * cost.primal, [q, k]), gradients(
            1e12 * (truth.held if gradient == "envelope" else truth.primal), [q, k]
        ), strict=True):  # fmt: skip
            assert relative_error(x, y) < 1e-9


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("unit", [1.0, 1e-12])
def test_a_warm_start_goes_on(tau: Any, unit: float) -> None:
    q, k = (torch.randn(1, 2, n, 4, dtype=D) for n in (5, 6))
    a, b = (unit * x for x in masses(1, 2, 5, 6, balanced=tau == (None, None)))
    options = {"epsilon": 0.3, "row_mass": a, "col_mass": b, "relaxation": tau}
    first = sinkhorn_cost(q, k, base_iters=10, **options)
    again = sinkhorn_cost(q, k, base_iters=10, initial_potentials=first[3:], **options)
    whole = sinkhorn_cost(q, k, base_iters=22, **options)
    for x, y in zip(again[:3], whole[:3], strict=True):
        assert abs(x / y - 1).max() < 1e-10
    bins = Dustbin(0.1, 0.2)
    warm = sinkhorn_cost(q, k, dustbin=bins)
    assert warm.row_potential.shape == (1, 2, 6) and not warm.row_potential.requires_grad
    sinkhorn_cost(q, k, dustbin=bins, initial_potentials=warm[3:])


def test_half_precision_and_what_holds_no_information() -> None:
    x = torch.randn(1, 6, 4)
    truth = sinkhorn_cost(x.bfloat16().double(), x.bfloat16().double())
    found = sinkhorn_cost(x.bfloat16(), x.bfloat16())
    for one, other in zip(found[:3], truth[:3], strict=True):
        assert one.dtype == torch.float32 and abs(one - other) < 1e-5 * abs(other).clamp(min=1)
    mask = torch.zeros(6, 6)
    mask[:, -1] = torch.nan  # of a key that lengths leave out
    lengths = torch.tensor(5)
    cost = sinkhorn_cost(x, x, mask, key_lengths=lengths)
    assert torch.equal(cost.primal, sinkhorn_cost(x, x, torch.zeros(6, 6), key_lengths=lengths).primal)


@pytest.mark.slow
def test_second_derivatives_are_refused_and_the_way_out_is_there() -> None:
    q = torch.randn(1, 4, 3, dtype=D, requires_grad=True)
    (grad,) = torch.autograd.grad(sinkhorn_cost(q, q).dual.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives alone"):
        grad.sum().backward()
    scores = torch.randn(1, 4, 5, dtype=D, requires_grad=True)
    (grad,) = torch.autograd.grad(-(sinkhorn_plan(scores) * scores).sum(), scores, create_graph=True)
    grad.square().sum().backward()
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("gradient", ["envelope", "tail"])
def test_forward_mode_is_refused_and_not_zero(gradient: str) -> None:
    q = torch.randn(1, 4, 3, dtype=D)
    for leaf in (q, q.clone().requires_grad_()):
        with pytest.raises(RuntimeError, match="in reverse mode"):
            torch.func.jvp(lambda x: sinkhorn_cost(x, x, gradient=gradient).dual, (leaf,), (torch.ones_like(q),))


def test_autocast_rounds_nothing() -> None:
    q, k = (30 * torch.randn(1, n, 4) for n in (5, 6))
    truth, plan = sinkhorn_cost(q, k, epsilon=10.0), sinkhorn_plan(q, k, log=True, epsilon=10.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for x, y in zip(sinkhorn_cost(q, k, epsilon=10.0), truth, strict=True):
            assert torch.equal(x, y)
        assert torch.equal(sinkhorn_plan(q, k, log=True, epsilon=10.0), plan)


@pytest.mark.parametrize("engine", ["reference", *ENGINES])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 3, 0, 4), (2, 3, 4, 0), (0, 2, 3, 4)])
def test_empty_sizes(shape: tuple[int, ...], engine: str) -> None:
    cost = sinkhorn_cost(torch.zeros(shape), engine=engine, relaxation=1.0)
    assert cost.primal.shape == shape[:-2] and torch.isfinite(cost.primal).all()


@pytest.mark.slow
def test_compiled_and_mapped() -> None:
    q, k = (torch.randn(3, 2, n, 4, requires_grad=True) for n in (5, 6))
    for gradient in ("envelope", "tail"):

        def primal(q: Tensor, k: Tensor, gradient: str = gradient) -> Tensor:
            return sinkhorn_cost(q, k, gradient=gradient).primal

        compiled = torch.compile(primal, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(q, k), primal(q, k)) < 1e-6
        pairs = zip(gradients(compiled(q, k), [q, k]), gradients(primal(q, k), [q, k]), strict=True)
        assert all(relative_error(x, y) < 1e-5 for x, y in pairs)
        assert relative_error(torch.vmap(primal)(q, k), primal(q, k)) < 1e-6


def test_memory_is_linear() -> None:
    """At 20,000 points a matrix of float32 would be 1.6 GB."""
    x, y = (torch.randn(1, 20_000, 2, requires_grad=True) for _ in range(2))
    query, key = squared_distance_features(x, y)
    cost = sinkhorn_cost(query, key, window=(8, 8), base_iters=2)
    cost.dual.sum().backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(y.grad).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gradient": "exact"}, "'envelope', 'tail'"),
        ({"dropout_p": 0.1}, "dropout_p=0.1"),
        ({"blur": 0.1}, "unknown option 'blur'"),
        ({"window": (1, 0)}, "window"),
    ],
)
def test_what_is_wrong_is_named(options: dict[str, Any], words: str) -> None:
    q = torch.randn(1, 4, 3)
    with pytest.raises((TypeError, ValueError), match=words):
        sinkhorn_cost(q, q, **options)
