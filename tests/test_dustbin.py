"""`Dustbin.superglue`: SuperGlue's loop, number for number."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from marks import slow_after
from torch import Tensor

from benchmarks.lib.superglue import log_optimal_transport
from torch_sinkhorn_attn import Dustbin, sinkhorn_plan

D = torch.float64
SHAPES = {"square": (5, 5), "wide": (3, 8), "tall": (9, 4), "one row": (1, 6), "one pair": (1, 1), "primes": (31, 37)}


def inputs(m: int, n: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(m * 100 + n)
    scores = 2 * torch.randn(batch, m, n, generator=g, dtype=D)
    return scores.requires_grad_(), torch.tensor(0.7, dtype=D, requires_grad=True)


def loss_and_gradients(log_plan: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """Of a loss that reads every entry of the log plan, dustbins and corner included."""
    weights = torch.linspace(-1, 1, log_plan.numel(), dtype=D).reshape(log_plan.shape).cos()
    return [log_plan.detach(), *torch.autograd.grad((log_plan * weights).sum(), leaves)]


@pytest.mark.parametrize("engine", ["reference", "tiled", "cpu"])
@pytest.mark.parametrize("shape", slow_after(1, SHAPES.values()), ids=SHAPES)
def test_its_plan_and_gradients_are_those_of_superglue_s_loop(shape: tuple[int, int], engine: str) -> None:
    scores, score = inputs(*shape)
    truth = loss_and_gradients(log_optimal_transport(scores, score, 400), (scores, score))
    options: Any = {"base_iters": 0, "tail_iters": 400, "engine": engine}
    ours = sinkhorn_plan(scores[:, None], log=True, dustbin=Dustbin.superglue(score), **options)
    for found, wanted in zip(loss_and_gradients(ours.squeeze(1), (scores, score)), truth, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-10)


def test_few_iterations_agree_too_once_the_sides_are_exchanged() -> None:
    """SuperGlue ends on columns and the plan here on rows."""
    scores, score = inputs(6, 9)
    truth = loss_and_gradients(log_optimal_transport(scores, score, 3), (scores, score))
    options: Any = {"base_iters": 0, "tail_iters": 3}
    ours = sinkhorn_plan(scores.mT[:, None], log=True, dustbin=Dustbin.superglue(score), **options)
    for found, wanted in zip(loss_and_gradients(ours.squeeze(1).mT, (scores, score)), truth, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", ["reference", "tiled", "cpu"])
def test_superglue_s_loss_is_finite_in_float32_at_a_score_deviation_of_20(engine: str) -> None:
    """Through the logarithm of a plan it is infinite."""
    g = torch.Generator().manual_seed(3)
    wide, score = 20 * torch.randn(1, 96, 80, generator=g), torch.tensor(40.0)
    partners = torch.randint(0, 81, (96,), generator=g)  # 80: the dustbin
    partners[:8] = wide[0, :8].argmin(-1)
    results = []
    for dtype in (D, torch.float32):
        leaves = [x.to(dtype).requires_grad_() for x in (wide, score)]
        options: Any = {"dustbin": Dustbin.superglue(leaves[1]), "base_iters": 98, "engine": engine}
        loss = -sinkhorn_plan(leaves[0], log=True, **options)[0, torch.arange(96), partners].mean()
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    through_exp = -sinkhorn_plan(leaves[0], **options)[0, torch.arange(96), partners].log().mean()
    assert through_exp == torch.inf and results[1][0].isfinite()
    for truth, found in zip(*results, strict=True):
        assert (found - truth).norm() < 1e-5 * truth.norm()


def test_the_score_is_divided_by_epsilon_like_any() -> None:
    scores, score = inputs(4, 7)
    truth = log_optimal_transport(scores / 0.5, score / 0.5, 300)
    ours = sinkhorn_plan(scores[:, None], log=True, dustbin=Dustbin.superglue(score), epsilon=0.5, base_iters=300)
    assert torch.allclose(ours.squeeze(1), truth, atol=1e-10)


def test_the_shared_gradient_is_the_sum_of_the_three() -> None:
    scores, score = inputs(4, 6)
    parts = [score.detach().clone().requires_grad_() for _ in range(3)]
    shared = sinkhorn_plan(scores[:, None], log=True, dustbin=Dustbin.superglue(score))
    apart = sinkhorn_plan(scores[:, None], log=True, dustbin=Dustbin(*parts))
    (whole,) = torch.autograd.grad(shared.sin().sum(), score)
    pieces = torch.autograd.grad(apart.sin().sum(), parts)
    assert torch.equal(shared, apart) and all(x != 0 for x in pieces)
    assert torch.allclose(whole, torch.stack(pieces).sum(), rtol=1e-12)


def test_scores_per_head_are_those_of_each_head_alone() -> None:
    scores = torch.randn(2, 3, 5, 4, dtype=D, generator=torch.Generator().manual_seed(0))
    score = torch.tensor([[-1.0], [0.5], [2.0]], dtype=D)
    ours = sinkhorn_plan(scores, log=True, dustbin=Dustbin.superglue(score), base_iters=300)
    for head in range(3):
        assert torch.allclose(ours[:, head], log_optimal_transport(scores[:, head], score[head], 300), atol=1e-10)


@pytest.mark.parametrize("engine", ["reference", "tiled", "cpu"])
@pytest.mark.parametrize("given", ["scores", "descriptors"])
def test_padded_batches_of_keypoints_are_each_pair_alone(given: str, engine: str) -> None:
    """What lies beyond the lengths is NaN here, and no part of anything."""
    g = torch.Generator().manual_seed(0)
    m, n, score = torch.tensor([6, 4, 1]), torch.tensor([5, 7, 7]), torch.tensor(0.5, dtype=D, requires_grad=True)
    options: Any = {"log": True, "dustbin": Dustbin.superglue(score), "base_iters": 60, "engine": engine}
    x, y = 2 * torch.randn(3, 6, 8, generator=g, dtype=D), 2 * torch.randn(3, 7, 8, generator=g, dtype=D)
    leaves = [x, y] if given == "descriptors" else [x @ y.mT]
    for b in range(3):
        if given == "descriptors":
            x[b, m[b] :], y[b, n[b] :] = torch.nan, torch.nan
        else:
            leaves[0][b, m[b] :], leaves[0][b, :, n[b] :] = torch.nan, torch.nan
    leaves = [z.requires_grad_() for z in leaves]
    padded = sinkhorn_plan(*leaves, query_lengths=m, key_lengths=n, **options)
    alone_total, padded_total = torch.zeros((), dtype=D), torch.zeros((), dtype=D)
    for b in range(3):
        rows, cols = [*range(m[b]), 6], [*range(n[b]), 7]
        real = [leaves[0][b, : m[b]], leaves[1][b, : n[b]]] if len(leaves) == 2 else [leaves[0][b, : m[b], : n[b]]]
        alone = sinkhorn_plan(*(z[None] for z in real), **options)[0]
        found = padded[b][rows][:, cols]
        assert torch.allclose(found, alone, atol=1e-10)
        alone_total, padded_total = alone_total + alone.sin().sum(), padded_total + found.sin().sum()
    assert (padded == -torch.inf).sum() == padded.numel() - ((m + 1) * (n + 1)).sum()
    wanted, found_grads = (torch.autograd.grad(t, [*leaves, score]) for t in (alone_total, padded_total))
    for one, other in zip(wanted, found_grads, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-11)


def test_numbers_and_one_element_are_one_score() -> None:
    scores, _ = inputs(3, 4)
    plans = [
        sinkhorn_plan(scores[:, None], log=True, dustbin=Dustbin.superglue(score))
        for score in (0.7, torch.tensor(0.7, dtype=D), torch.tensor([0.7], dtype=D))
    ]
    assert torch.equal(plans[0], plans[1]) and torch.equal(plans[0], plans[2])
    for copied in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        assert copied(Dustbin.superglue(0.7)) == Dustbin(0.7, 0.7, 0.7)


@pytest.mark.parametrize(
    ("score", "error", "match"),
    [
        (torch.zeros(2, 5), ValueError, r"one score for each problem.*\(2, 5\).*Dustbin\(row_score, col_score\)"),
        (torch.zeros(3), ValueError, "one score for each problem"),
        (torch.ones(1, dtype=torch.long), TypeError, "floating-point"),
        (float("nan"), ValueError, "must be finite"),
        (True, TypeError, "number or a tensor"),
        (None, TypeError, "number or a tensor"),
    ],
)
def test_other_scores_are_refused(score: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Dustbin.superglue(score)
