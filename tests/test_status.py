"""What SinkhornAux and Certificate say after the fact: converged, not converged, no plan."""

from __future__ import annotations

import pickle

import pytest
import torch

from torch_sinkhorn_attn import Dustbin, Status, certify, set_checks, sinkhorn_attention

X = torch.randn(2, 2, 20, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[0] * 10 + [1] * 10] * 2)


def crowded() -> torch.Tensor:
    """Batch element 1, head 0: ten queries reach five keys, in random order."""
    mask = torch.ones(2, 2, 20, 20, dtype=torch.bool)
    mask[1, 0, :10, 5:] = False
    g = torch.Generator().manual_seed(1)
    return mask[..., torch.randperm(20, generator=g), :][..., torch.randperm(20, generator=g)]


@pytest.mark.parametrize("base_iters", [20, 500])
@pytest.mark.parametrize("engine", ["reference", "tiled", None])
def test_without_checks_the_aux_tells(engine: str | None, base_iters: int) -> None:
    set_checks("never")
    mask = crowded()
    _, aux = sinkhorn_attention(X, X, X, mask, base_iters=base_iters, engine=engine, return_aux=True)
    assert len(aux) == 6 and aux.status().tolist() == [[0, 0], [Status.NO_PLAN, 0]]
    verdict = aux.verdict()
    assert verdict.startswith("no plan in 1 of 4 problems (batch and head: (1, 0))") and "batch 1, head 0" in verdict
    assert "converged in 3 of 4" in verdict and "attn_mask" in verdict and "window" not in verdict
    assert pickle.loads(pickle.dumps(aux)).verdict() == verdict


def test_without_checks_the_certificate_tells() -> None:
    set_checks("never")
    table = certify(X, X, crowded(), base_iters=100)
    assert table.status.tolist() == [[0, 0], [2, 0]] and len(table.reasons) == 1
    line = next(line for line in str(table).splitlines() if line.strip().startswith("1,0"))
    assert "no plan" in line and "%" not in line
    assert "no plan: 1 of 4. attn_mask has no balanced plan" in str(table)
    packed = certify(X, X, window=(-1, 2), query_segment_ids=IDS, key_segment_ids=IDS, base_iters=0, tail_iters=1)
    assert (packed.status[..., :2] == Status.NOT_CONVERGED).all()
    one_sided = torch.ones(20, 20, dtype=torch.bool)
    one_sided[10:, 10:].tril_()
    found = certify(X, X, one_sided, query_segment_ids=IDS, key_segment_ids=IDS, base_iters=2000).status
    assert (found[..., 0] == Status.CONVERGED).all() and (found[..., 1] == Status.NO_PLAN).all()


@pytest.mark.parametrize("options", [{"window": (-1, 0)}, {"window": (0, 3)}])
def test_a_forced_block_is_no_plan_whatever_the_residuals(options: dict) -> None:
    """They fall like 1/T there, and the potentials grow like log T."""
    set_checks("never")
    for base_iters in (5, 3000):
        _, aux = sinkhorn_attention(X, X, X, base_iters=base_iters, return_aux=True, **options)
        assert (aux.status() == Status.NO_PLAN).all() and "identity" in aux.verdict()


def test_converged_or_not() -> None:
    few, many = (sinkhorn_attention(X, X, X, window=(4, 4), base_iters=t, return_aux=True)[1] for t in (1, 500))
    assert few.verdict().startswith("not converged: a marginal is off by") and many.verdict() == "converged"
    assert (few.status(within=10.0) == Status.CONVERGED).all()
    mass = torch.rand(20) * 1e-6 + 1e-7  # errors are small against the masses, not against 1
    few, many = (sinkhorn_attention(3 * X, X, X, row_mass=mass, base_iters=t, return_aux=True)[1] for t in (0, 500))
    assert few.col_residual.max() < 1e-4 and (few.status() == Status.NOT_CONVERGED).all()
    assert (many.status() == Status.CONVERGED).all()


def test_relaxed_and_with_a_dustbin() -> None:
    mask = crowded()
    assert (sinkhorn_attention(X, X, X, mask, relaxation=1.0, return_aux=True)[1].status() == Status.RELAXED).all()
    for options in ({"relaxation": (1.0, None)}, {"dustbin": Dustbin(0.0, 0.0)}):
        _, aux = sinkhorn_attention(X, X, X, mask, base_iters=300, return_aux=True, **options)
        assert aux.verdict() == "converged"
    set_checks("never")
    _, aux = sinkhorn_attention(X, X, X, mask, dustbin=Dustbin(0.0, 0.0, col_capacity=4.0), return_aux=True)
    assert int(aux.status()[1, 0]) == Status.NO_PLAN and (aux.status() == Status.NO_PLAN).sum() == 1


@pytest.mark.slow
def test_compiled_and_mapped_calls_are_told_the_question_again() -> None:
    mask = crowded()
    compiled = torch.compile(lambda x: sinkhorn_attention(x, x, x, mask, return_aux=True), backend="eager")
    _, aux = compiled(X)
    assert "repeat the call's mask" in aux.verdict() and int(aux.status()[1, 0]) == Status.NOT_CONVERGED
    assert aux.verdict(attn_mask=mask).startswith("no plan in 1 of 4")
    assert aux.status(attn_mask=mask).tolist() == [[0, 0], [2, 0]]
    one_way = torch.compile(
        lambda x: sinkhorn_attention(
            x,
            x,
            x,
            window=(-1, 0),
            query_segment_ids=IDS,
            key_segment_ids=IDS,
            dustbin=Dustbin(0.0, 0.0),
            return_aux=True,
        ),
        backend="eager",
    )
    _, aux = one_way(X)
    options = {"query_segment_ids": IDS, "key_segment_ids": IDS, "window": (-1, 0)}
    assert (aux.status(dustbin=Dustbin(0.0, 0.0), **options) != Status.NO_PLAN).all()


def test_nan_is_not_converged() -> None:
    x = X.clone()
    x[0, 0, 3] = torch.nan
    _, aux = sinkhorn_attention(x, x, x, return_aux=True)
    assert int(aux.status()[0, 0]) == Status.NOT_CONVERGED and "nan" in aux.verdict()


def test_softmax_mode_asks_nothing_of_columns() -> None:
    x = torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    _, aux = sinkhorn_attention(x, x, x, base_iters=0, tail_iters=0, return_aux=True)
    assert aux.col_residual.max() > 0.1 and aux.verdict() == "converged"
    assert "not converged" in aux.verdict(base_iters=20)  # what was said of another call
