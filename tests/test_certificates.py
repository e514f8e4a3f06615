"""Each certificate really bounds, on many random problems."""

from __future__ import annotations

import problems
import pytest
import torch
from marks import slow_after
from torch import Tensor

from torch_sinkhorn_attn import Certificate, Dustbin, certify, sinkhorn_attention, sinkhorn_plan
from torch_sinkhorn_attn.method import reference
from torch_sinkhorn_attn.problem.arguments import prepare
from torch_sinkhorn_attn.problem.feasibility.parts import masked_components

D = torch.float64


def pair(
    seed: int, n: int = 7, m: int = 9, heads: int = 2, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(1, heads, n, 4), (1, heads, m, 4), (1, heads, m, 3), (1, heads, n, 3)]
    q, k, v, grad = (torch.randn(s, generator=g, dtype=D) for s in shapes)
    return q * scale, k * scale, v, grad


def score_cotangent(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, mask: Tensor | None = None, **options) -> Tensor:
    """dL/dS of the reference, for the cotangent `grad` of the output, by a float mask that broadcasts over nothing."""
    shape = (*q.shape[:-1], k.shape[-2])
    zero = torch.zeros(shape, dtype=D) if mask is None else torch.zeros(shape, dtype=D).masked_fill(~mask, -torch.inf)
    zero.requires_grad_()
    out = sinkhorn_attention(q, k, v, zero, engine="reference", **options)
    return torch.autograd.grad(out, zero, grad)[0]


def l1(x: Tensor) -> Tensor:
    return x.abs().sum((-1, -2))


@pytest.mark.parametrize("seed", range(60))
def test_certificates_run_on_every_option(seed: int) -> None:
    call = problems.make(seed)
    call.options.pop("dropout_p", None)
    c = certify(call.query, call.key, call.mask, value=call.value, **call.options)
    aux = sinkhorn_attention(call.query, call.key, call.value, call.mask, return_aux=True, **call.options)[1]
    per_segment = "query_segment_ids" in call.options
    shape = (*call.query.shape[:-2], *([min(call.query.shape[-2], call.key.shape[-2])] if per_segment else []))
    for name in Certificate.__dataclass_fields__:
        x = getattr(c, name)
        assert x.shape == shape and not x.isnan().any(), (name, call)
    for found, truth in ((c.row_residual_max, aux.row_residual), (c.col_residual_max, aux.col_residual)):
        assert torch.allclose(found.amax(-1) if per_segment else found, truth, atol=1e-12)
    assert (c.row_residual_l1 + 1e-15 >= c.row_residual_max).all()
    assert str(c).count("\n") >= 1


@pytest.mark.parametrize("seed", range(20))
def test_diameter_bound_and_exact(seed: int) -> None:
    q, k, _, _ = pair(seed)
    dustbin = [None, Dustbin(0.5, -0.5)][seed % 2]
    bound = certify(q, k, dustbin=dustbin)
    exact = certify(q, k, dustbin=dustbin, exact_diameter=True)
    prepared = prepare(q, k, None, dustbin=dustbin)
    S = reference.dense_problem(prepared.inputs, prepared.problem).scores
    cross = S[..., :, None, :, None] + S[..., None, :, None, :] - S[..., :, None, None, :] - S[..., None, :, :, None]
    truth = cross.amax((-1, -2, -3, -4))
    assert torch.allclose(exact.diameter, truth, atol=1e-12)
    assert (bound.diameter >= truth - 1e-12).all() and bound.positive.all()
    assert torch.allclose(exact.contraction, (truth / 4).tanh())


@pytest.mark.parametrize("seed", range(20))
def test_half_steps_contract_by_kappa_in_hilberts_metric(seed: int) -> None:
    q, k, _, _ = pair(seed)
    kappa = certify(q, k, exact_diameter=True).contraction
    prepared = prepare(q, k, None)
    dense = reference.dense_problem(prepared.inputs, prepared.problem)

    def oscillation(x: Tensor) -> Tensor:
        return x.amax(-1) - x.amin(-1)

    for scale in (0.1, 1.0, 10.0):
        u, w = (scale * torch.randn(1, 2, 7, dtype=D) for _ in range(2))
        images = [reference.half_step(dense.scores, x, dense.log_b, 1.0, dim=-2) for x in (u, w)]
        assert (oscillation(images[0] - images[1]) <= kappa * oscillation(u - w) + 1e-12).all()


def test_not_certified_where_a_pair_is_missing() -> None:
    q, k, v, grad = pair(0)
    mask = torch.ones(7, 9, dtype=torch.bool)
    mask[2, 3] = False
    for options in ({"window": (4, 4)}, {"attn_mask": mask}):
        c = certify(q, k, value=v, grad_output=grad, **options)
        assert not c.positive.any() and (c.contraction == 1).all()
        assert c.bias_bound.isinf().all() and c.implicit_bias_bound.isinf().all()
        assert "not certified" in str(c)
        assert (c.rate < 1).all()  # the a-posteriori rate works there
    mask[2] = False  # a whole line leaves the active block: positive again
    assert certify(q, k, mask).positive.all()
    assert certify(q, k, relaxation=1.0).bias_bound.isinf().all()


@pytest.mark.slow
@pytest.mark.parametrize("start", slow_after(1, range(0, 300, 60)))
def test_bias_bound_bounds(start: int) -> None:
    """||dS_unrolled - dS_tail||_1 <= bound, for T, R, scales, masses and dustbins at random."""
    largest = 0.0
    for seed in range(start, start + 60):
        g = torch.Generator().manual_seed(seed)
        n, m, base, tail = (
            int(torch.randint(lo, hi, (1,), generator=g)) for lo, hi in ((2, 7), (2, 7), (0, 8), (0, 3))
        )
        q, k, v, grad = pair(seed, n, m, 1, scale=float(0.3 + torch.rand(1, generator=g)))
        options = {"base_iters": base, "tail_iters": tail}
        if seed % 3 == 1:
            options["row_mass"] = torch.rand(n, generator=g, dtype=D) + 0.3
        if seed % 3 == 2:
            options["dustbin"] = Dustbin(0.5, 0.2)
        c = certify(q, k, value=v, grad_output=grad, exact_diameter=True, **options)
        tail_dS = score_cotangent(q, k, v, grad, **options)
        unrolled_dS = score_cotangent(q, k, v, grad, gradient="unrolled", **options)
        difference = l1(unrolled_dS - tail_dS)
        assert (difference <= c.bias_bound * (1 + 1e-9) + 1e-13).all(), seed
        if base and (c.bias_bound > 1e-12).all():
            largest = max(largest, float((difference / c.bias_bound).max()))
    assert 0.05 < largest <= 1 + 1e-9  # the bound is a bound, and not an idle one


@pytest.mark.parametrize("seed", slow_after(6, range(30)))
def test_implicit_bound_bounds_at_convergence_and_measured_bias_is_measured(seed: int) -> None:
    q, k, v, grad = pair(seed, 6, 5, 1, scale=0.8)
    options = {"base_iters": 400, "tail_iters": 1 + seed % 2}
    c = certify(q, k, value=v, grad_output=grad, exact_diameter=True, **options)
    tail_dS = score_cotangent(q, k, v, grad, **options)
    implicit_dS = score_cotangent(q, k, v, grad, gradient="implicit", **options)
    assert torch.allclose(c.measured_bias, l1(tail_dS - implicit_dS), rtol=1e-8, atol=1e-13)
    assert torch.allclose(c.implicit_norm, l1(implicit_dS), rtol=1e-9)
    assert (c.measured_bias <= c.implicit_bias_bound * (1 + 1e-9) + 1e-13).all()
    assert torch.allclose(c.relative_bias, c.measured_bias / c.implicit_norm)


def test_bias_falls_with_the_tail_and_vanishes_for_the_implicit_gradient() -> None:
    q, k, v, grad = pair(1, 12, 12)
    options = {"value": v, "grad_output": grad, "base_iters": 300}
    biases = torch.stack([certify(q, k, tail_iters=r, **options).relative_bias for r in (1, 2, 4, 8)])
    assert (biases[1:] < biases[:-1]).all()
    assert (certify(q, k, gradient="implicit", **options).measured_bias == 0).all()


@pytest.mark.parametrize(
    "options", [{}, {"window": (3, 3)}, {"dustbin": Dustbin(0.3, 0.1)}, {"relaxation": (1.0, None)}]
)
def test_rate_is_the_second_singular_value_squared(options: dict) -> None:
    q, k, _, _ = pair(2, 9, 9)
    options = {"base_iters": 2000, **options}
    rate = certify(q, k, **options).rate
    plan = sinkhorn_plan(q, k, **options)
    normal = plan / (plan.sum(-1, keepdim=True) * plan.sum(-2, keepdim=True)).sqrt()
    sigma = torch.linalg.svdvals(normal)
    rho = 0.5 if "relaxation" in options else 1.0
    truth = rho * sigma[..., 0 if "relaxation" in options else 1] ** 2
    assert torch.allclose(rate, truth, rtol=2e-3) and (rate <= truth * (1 + 1e-9)).all()


@pytest.mark.parametrize("options", [{}, {"window": (4, 4)}])
def test_iterates_near_the_fixed_point_contract_at_the_rate(options: dict) -> None:
    q, k, v, _ = pair(3, 10, 10)
    rate = certify(q, k, base_iters=3000, **options).rate

    def potential(iters: int) -> Tensor:
        aux = sinkhorn_attention(q, k, v, base_iters=iters, tail_iters=1, return_aux=True, **options)[1]
        return aux.row_potential - aux.row_potential.mean(-1, keepdim=True)

    limit = potential(3000)
    errors = torch.stack([(potential(t) - limit).norm(dim=-1) for t in (12, 13)])
    assert torch.allclose(errors[1] / errors[0], rate, rtol=0.05)


def test_mask_components_are_found_for_deflation() -> None:
    """A block-diagonal mask has two null vectors: with one deflated the rate would read 1."""
    q, k, _, _ = pair(4, 8, 8)
    mask = torch.block_diag(torch.ones(3, 3), torch.ones(5, 5)).bool()
    order = torch.randperm(8)
    assert (certify(q, k[..., order, :], mask[:, order], base_iters=500).rate < 0.95).all()
    prepared = prepare(q, k, None, mask)
    parts = masked_components(prepared.inputs, prepared.problem)
    assert parts.row[0, 0].tolist() == [0] * 3 + [3] * 5 and parts.col[0, 0].tolist() == [0] * 3 + [3] * 5


def test_certificates_per_segment_equal_separate_ones() -> None:
    q, k, v, grad = pair(5, 9, 9)
    ids = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
    packed = certify(q, k, value=v, grad_output=grad, query_segment_ids=ids[None], key_segment_ids=ids[None])
    for g in (0, 1):
        own = [x[..., ids == g, :] for x in (q, k, v, grad)]
        alone = certify(own[0], own[1], value=own[2], grad_output=own[3])
        for name in Certificate.__dataclass_fields__:
            assert torch.allclose(
                getattr(packed, name)[..., g].double(), getattr(alone, name).double(), rtol=1e-3, atol=1e-11
            ), name


def test_packed_certificates_without_any_iteration() -> None:
    """With T = R = 0 the dropped cotangent lives on columns, whatever the gradient."""
    q, k, _, _ = pair(6, 5, 9)
    ids = torch.tensor([[0, 0, 1, 1, 1]]), torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    options = {"query_segment_ids": ids[0], "key_segment_ids": ids[1], "base_iters": 0, "tail_iters": 0}
    tail, unrolled = (certify(q, k, gradient=g, **options) for g in ("tail", "unrolled"))
    assert tail.dropped.shape == (1, 2, 5) and torch.equal(tail.dropped, unrolled.dropped)
    assert (tail.bias_bound == 0).all()  # v = 0 comes from nowhere: nothing was dropped on the way to it


def test_page_one_measurements() -> None:
    """n = 128, d = 32, converged, R = 2, epsilon 1: a dense plan has a bias below 1 %, a band of 16 a few percent."""
    g = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, 128, 32, generator=g, dtype=D) for _ in range(4))
    options = {"value": v, "grad_output": grad, "base_iters": 2000}
    dense = certify(q, k, **options).relative_bias.item()
    band = certify(q, k, window=(16, 16), **options).relative_bias.item()
    assert dense < 0.005 and 0.005 < band < 0.15 and band > 10 * dense


@pytest.mark.parametrize("mode", ["exact", "quick"])
def test_what_is_no_tensor_is_named(mode: str) -> None:
    for arguments, name in (((torch.zeros(2, 2).numpy(),), "query"), ((torch.zeros(1, 2, 2), [1.0]), "key")):
        with pytest.raises(TypeError, match=f"{name} must be a tensor"):
            certify(*arguments, mode=mode)
