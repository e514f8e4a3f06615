"""Lengths, segments and centres of each head are those of batch elements of one head each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance import ENGINES, relative_error
from torch import Tensor

from torch_sinkhorn_attn import Dustbin, sinkhorn_attention, sinkhorn_plan

D = torch.float64
B, N, M = 4, 7, 9
ROWS, COLS = torch.tensor([7, 3, 5, 1]), torch.tensor([9, 9, 2, 4])


def points() -> list[Tensor]:
    return [torch.randn(B, n, 5, dtype=D) for n in (N, M, M)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dustbin": Dustbin(torch.randn(B, 1, dtype=D), torch.randn(M, dtype=D), torch.randn(B, dtype=D))},
        {"dustbin": Dustbin(0.3, torch.randn(B, M, dtype=D), value=torch.randn(B, 5, dtype=D))},
        {"row_mass": torch.rand(B, N, dtype=D) + 0.5, "relaxation": 2.0},
        {"attn_mask": torch.rand(B, N, M) > 0.1},
        {"attn_mask": torch.randn(N, M, dtype=D)},
        {"window": (6, 6), "window_centers": torch.linspace(0, 3, N, dtype=D)},
        {"initial_potentials": (torch.randn(B, N, dtype=D), torch.randn(B, M, dtype=D))},
    ],
)
def test_padded_points_are_the_points_alone(options: dict[str, Any], engine: str) -> None:
    given = {"query_lengths": ROWS, "key_lengths": COLS, "relaxation": 3.0} | options
    q, k, v = points()
    output, aux = sinkhorn_attention(q, k, v, engine=engine, return_aux=True, **given)
    plan = sinkhorn_plan(q, k, engine=engine, **given)
    extra = int("dustbin" in options)
    assert output.shape == (B, N, 5) and plan.shape == (B, N + extra, M + extra)
    assert aux.row_residual.shape == (B,) and aux.row_potential.shape == (B, N + extra)
    for b in range(B):
        one = _of(b, given)
        alone, its = sinkhorn_attention(*(x[b : b + 1, None] for x in (q, k, v)), engine=engine, return_aux=True, **one)
        assert relative_error(output[b], alone[0, 0]) < 1e-11
        assert relative_error(aux.col_potential[b], its.col_potential[0, 0]) < 1e-11
        assert (
            relative_error(plan[b], sinkhorn_plan(*(x[b : b + 1, None] for x in (q, k)), engine=engine, **one)[0, 0])
            < 1e-11
        )


def _of(b: int, options: dict[str, Any]) -> dict[str, Any]:
    """The options of batch element b of one head."""

    def one(x: Any, own: int) -> Any:
        if not isinstance(x, Tensor) or x.ndim <= own:
            return x
        return x[b][None, None]

    found = dict(options)
    for name in ("query_lengths", "key_lengths"):
        found[name] = found[name][b : b + 1]
    for name, own in (("row_mass", 1), ("attn_mask", 2)):
        if name in found:
            found[name] = one(found[name], own)
    if "initial_potentials" in found:
        found["initial_potentials"] = tuple(one(x, 1) for x in found["initial_potentials"])
    if "dustbin" in found:
        bins = found["dustbin"]
        found["dustbin"] = Dustbin(
            one(bins.row_score, 1), one(bins.col_score, 1), one(bins.corner_score, 0), value=one(bins.value, 1)
        )
    return found


def test_segments_and_centres_of_each_head() -> None:
    q = points()[0]
    ids = torch.tensor([[0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0], [-1, 0, 0, 0, 1, 1, 1], [5, 5, 5, 6, 6, 6, 6]])
    plan = sinkhorn_plan(q, q, query_segment_ids=ids, key_segment_ids=ids)
    centres = torch.linspace(0, 6, N, dtype=D) * torch.tensor([[1.0], [0.9], [0.8], [1.0]], dtype=D)
    banded = sinkhorn_plan(q, q, window=(3, 3), window_centers=centres)
    for b in range(B):
        one = sinkhorn_plan(q[b][None], q[b][None], query_segment_ids=ids[b], key_segment_ids=ids[b])
        assert relative_error(plan[b], one[0]) < 1e-12
        one = sinkhorn_plan(q[b][None], q[b][None], window=(3, 3), window_centers=centres[b])
        assert relative_error(banded[b], one[0]) < 1e-12


def test_grouped_queries_and_gradients() -> None:
    q = torch.randn(2, 4, 6, 3, dtype=D, requires_grad=True)
    k, v = (torch.randn(2, 2, 6, 3, dtype=D, requires_grad=True) for _ in range(2))
    lengths = torch.tensor([[6, 6, 3, 3], [2, 2, 5, 5]])
    found = sinkhorn_attention(q, k, v, enable_gqa=True, query_lengths=lengths, key_lengths=lengths)
    grads = torch.autograd.grad(found.square().sum(), (q, k, v))
    expected = [torch.zeros_like(x) for x in (q, k, v)]
    for n in range(2):
        for g in range(2):
            part = [x[n : n + 1] for x in (q[:, 2 * g : 2 * g + 2], k[:, g : g + 1], v[:, g : g + 1])]
            one = lengths[n, 2 * g : 2 * g + 1]
            alone = sinkhorn_attention(*part, enable_gqa=True, query_lengths=one, key_lengths=one)
            assert relative_error(found[n, 2 * g : 2 * g + 2], alone[0]) < 1e-12
            for total, x in zip(expected, torch.autograd.grad(alone.square().sum(), (q, k, v)), strict=True):
                total += x
    for x, y in zip(grads, expected, strict=True):
        assert relative_error(x, y) < 1e-11


def test_the_message_says_what_to_do() -> None:
    q = torch.zeros(4, 7, 5)
    with pytest.raises(ValueError, match="one for each head"):
        sinkhorn_plan(q, q, query_lengths=torch.tensor([1, 2, 3]))
