"""The definition against closed forms."""

from __future__ import annotations

import problems
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_sinkhorn_attn import Dustbin, sinkhorn_attention, sinkhorn_plan

D = torch.float64


def tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g, dtype=D) for shape in shapes]


def attention(*args, **options) -> Tensor:
    return sinkhorn_attention(*args, engine="reference", **options)


def plan(*args, **options) -> Tensor:
    return sinkhorn_plan(*args, engine="reference", **options)


QKV = ((2, 3, 7, 4), (2, 3, 9, 4), (2, 3, 9, 5))


@pytest.mark.parametrize("kind", ["none", "bool", "float", "gqa"])
def test_no_iterations_is_softmax_attention(kind: str) -> None:
    q, k, v = tensors(*QKV)
    mask = {"none": None, "bool": torch.rand(7, 9) < 0.7, "float": torch.randn(3, 7, 9, dtype=D), "gqa": None}[kind]
    if kind == "gqa":
        k, v = k[:, :1], v[:, :1]
    truth = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=kind == "gqa")
    found = attention(q, k, v, mask, base_iters=0, tail_iters=0, enable_gqa=kind == "gqa")
    assert torch.allclose(found, truth, rtol=1e-13, atol=1e-14)


def test_softmax_of_a_fully_masked_row_is_zero_not_nan() -> None:
    q, k, v = tensors(*QKV)
    mask = torch.ones(7, 9, dtype=torch.bool)
    mask[3] = False
    found = attention(q, k, v, mask, base_iters=0, tail_iters=0)
    assert (found[..., 3, :] == 0).all()


def test_large_epsilon_is_uniform() -> None:
    q, k, _ = tensors(*QKV)
    assert torch.allclose(plan(q, k, epsilon=1e9), torch.full((2, 3, 7, 9), 1 / 9, dtype=D), atol=1e-8)


def test_permuted_keys_permute_the_plan() -> None:
    q, k, _ = tensors(*QKV)
    order = torch.randperm(9)
    assert torch.allclose(plan(q, k[..., order, :]), plan(q, k)[..., order], atol=1e-14)


def test_a_window_as_wide_as_the_sequence_is_full() -> None:
    q, k, _ = tensors(*QKV)
    assert torch.equal(plan(q, k, window=(9, 9)), plan(q, k))
    assert torch.equal(plan(q, k, window=(-1, -1)), plan(q, k))


@pytest.mark.parametrize("sizes", [(8, 8), (6, 12), (9, 6)])
def test_a_band_is_the_same_band_as_a_mask(sizes: tuple[int, int]) -> None:
    n, m = sizes
    q, k = tensors((2, n, 4), (2, m, 4))
    centre = (torch.arange(n, dtype=D) + 0.5) * m / n - 0.5
    offset = torch.arange(m, dtype=D) - centre[:, None]
    band = (offset >= -2 - 1e-9) & (offset <= 3 + 1e-9)
    assert torch.allclose(plan(q, k, window=(2, 3)), plan(q, k, band), atol=1e-14)


def test_padded_equals_unpadded() -> None:
    q, k, v = tensors(*QKV)
    full = attention(q, k, v, query_lengths=torch.tensor([4, 7]), key_lengths=torch.tensor([9, 5]), window=(5, 5))
    first = attention(q[:1, :, :4], k[:1], v[:1], window=(5, 5))
    second = attention(q[1:], k[1:, :, :5], v[1:, :, :5], window=(5, 5))
    assert torch.allclose(full[:1, :, :4], first, atol=1e-14) and (full[:1, :, 4:] == 0).all()
    assert torch.allclose(full[1:], second, atol=1e-14)


@pytest.mark.parametrize("dustbin", [None, Dustbin(0.3, -0.2, 0.1), Dustbin(0.3, -0.2, row_capacity=9.0)])
@pytest.mark.parametrize("masses", [False, True])
def test_packed_equals_separate(dustbin: Dustbin | None, masses: bool) -> None:
    q, k, v = tensors(*QKV)
    rows = torch.tensor([0, 0, 0, -1, 5, 5, 2]).expand(2, -1)
    cols = torch.tensor([0, 0, 5, 5, 5, -1, 5, 2, 2]).expand(2, -1)
    mass = torch.rand(3, 7, dtype=D) + 0.5
    options = {"window": (3, 3), "dustbin": dustbin, "row_mass": mass if masses else None}
    packed = attention(q, k, v, query_segment_ids=rows, key_segment_ids=cols, **options)
    for i in (0, 5, 2):
        r, c = rows[0] == i, cols[0] == i
        own = options | {"row_mass": mass[:, r] if masses else None}
        assert torch.allclose(packed[..., r, :], attention(q[..., r, :], k[..., c, :], v[..., c, :], **own), atol=1e-13)
    assert (packed[..., 3, :] == 0).all()


def test_dustbin_of_low_score_is_no_dustbin() -> None:
    q, k, v = tensors((2, 3, 6, 4), (2, 3, 6, 4), (2, 3, 6, 5))
    without = attention(q, k, v, base_iters=500)
    far = attention(q, k, v, base_iters=500, dustbin=Dustbin(-60.0, -60.0))
    assert torch.allclose(far, without, atol=1e-9)


def test_column_shifts_of_the_scores_leave_the_plan() -> None:
    q, k, _ = tensors(*QKV)
    shift = torch.randn(1, 9, dtype=D) * 3
    assert torch.allclose(
        plan(q, k, shift, base_iters=0, tail_iters=1), plan(q, k, base_iters=0, tail_iters=1), atol=1e-13
    )


def test_row_shifts_leave_the_converged_plan() -> None:
    q, k, _ = tensors(*QKV)
    shift = torch.randn(7, 1, dtype=D) * 3
    assert torch.allclose(plan(q, k, shift, base_iters=500), plan(q, k, base_iters=500), atol=1e-12)


def test_transposing_swaps_the_marginals() -> None:
    q, k, _ = tensors(*QKV)
    a, b = torch.rand(7, dtype=D) + 0.5, torch.rand(9, dtype=D) + 0.5
    b = b * a.sum() / b.sum()
    there = plan(q, k, row_mass=a, col_mass=b, base_iters=500)
    back = plan(k, q, row_mass=b, col_mass=a, base_iters=500)
    assert torch.allclose(there, back.transpose(-1, -2), atol=1e-12)
    assert torch.allclose(there.sum(-1), a.expand(2, 3, 7)) and torch.allclose(there.sum(-2), b.expand(2, 3, 9))


def test_strong_relaxation_penalty_is_balanced() -> None:
    q, k, _ = tensors(*QKV)
    assert torch.allclose(plan(q, k, relaxation=1e12), plan(q, k), atol=1e-9)
    assert torch.equal(plan(q, k, relaxation=float("inf")), plan(q, k))
    assert torch.equal(plan(q, k, relaxation=(None, float("inf"))), plan(q, k))


def test_relaxed_plan_meets_its_optimality_condition() -> None:
    """At convergence P 1 = a exp(-u epsilon / tau), the first-order condition of the KL penalty."""
    q, k, v = tensors(*QKV)
    _, aux = sinkhorn_attention(
        q, k, v, relaxation=(2.0, 0.5), epsilon=0.7, base_iters=500, return_aux=True, engine="reference"
    )
    p = plan(q, k, relaxation=(2.0, 0.5), epsilon=0.7, base_iters=500)
    assert torch.allclose(p.sum(-1), (-aux.row_potential * 0.7 / 2.0).exp(), atol=1e-12)
    assert torch.allclose(p.sum(-2), 7 / 9 * (-aux.col_potential * 0.7 / 0.5).exp(), atol=1e-12)


def test_output_rows_are_exact_averages() -> None:
    q, k, _ = tensors(*QKV)
    ones = torch.ones(2, 3, 9, 1, dtype=D)
    a = torch.rand(7, dtype=D) + 0.1
    out = attention(q, k, ones, row_mass=a, base_iters=3)
    assert torch.allclose(out, torch.ones_like(out), atol=1e-13)


def test_warm_start_continues_the_iteration() -> None:
    q, k, v = tensors(*QKV)
    whole = attention(q, k, v, base_iters=9, tail_iters=2)
    _, aux = sinkhorn_attention(q, k, v, base_iters=4, tail_iters=1, return_aux=True, engine="reference")
    rest = attention(q, k, v, base_iters=4, tail_iters=2, initial_potentials=(aux.row_potential, aux.col_potential))
    assert torch.allclose(rest, whole, atol=1e-13)


@pytest.mark.parametrize("seed", range(40))
def test_all_gradients_share_one_forward(seed: int) -> None:
    call = problems.make(seed, dropout=False, base_options=False)
    outputs = [
        attention(call.query, call.key, call.value, call.mask, **(call.options | {"gradient": gradient}))
        for gradient in ("tail", "unrolled", "implicit")
    ]
    assert torch.allclose(outputs[0], outputs[1], atol=1e-11) and torch.allclose(outputs[0], outputs[2], atol=1e-14)


def test_half_of_finfo_min_forbids_as_minus_infinity_does() -> None:
    q, k, v = tensors(*QKV)
    dead = torch.rand(7, 9) < 0.2
    dead[:, 0] = False
    for low in (-torch.inf, torch.finfo(D).min, torch.finfo(D).min / 2):
        mask = torch.zeros(7, 9, dtype=D).masked_fill(dead, low)
        assert torch.equal(attention(q, k, v, mask), attention(q, k, v, ~dead))


def test_the_inputs_dtype_decides_the_precision() -> None:
    q, k, v = tensors(*QKV)
    assert attention(q, k, v).dtype == D
    assert attention(q.float(), k.float(), v.float()).dtype == torch.float32
    assert (attention(q.float(), k.float(), v.float()).double() - attention(q, k, v)).abs().max() < 1e-5
