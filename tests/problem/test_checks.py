"""set_checks: what looks at data runs only where it may, and accelerators are never asked."""

from __future__ import annotations

import pytest
import torch
from marks import slow_after
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_sinkhorn_attn import Dustbin, set_checks, sinkhorn_attention, sinkhorn_plan
from torch_sinkhorn_attn.engines.tiled.engine import ENGINE as tiled
from torch_sinkhorn_attn.problem import looking as checks
from torch_sinkhorn_attn.problem.arguments import prepare
from torch_sinkhorn_attn.problem.problem import OutputGrads

X = torch.randn(1, 2, 6, 4)


def test_never_lets_an_infeasible_problem_through_without_nan() -> None:
    set_checks("never")
    mask = torch.zeros(6, 6)
    mask[1] = -torch.inf
    for options in (
        {"window": (-1, 0)},
        {"window": (0, 2)},
        {"row_mass": torch.rand(6) + 0.1, "col_mass": torch.ones(6)},
    ):
        query = X.clone().requires_grad_()
        out, aux = sinkhorn_attention(query, X, X, mask, return_aux=True, **options)
        (grad,) = torch.autograd.grad(out.sum(), query)
        assert torch.isfinite(out).all() and torch.isfinite(grad).all()
        assert aux.col_residual.max() > 1e-3  # the residuals tell


def test_shape_checks_always_run() -> None:
    set_checks("never")
    with pytest.raises(ValueError, match="features"):
        sinkhorn_plan(X, X[..., :3])


def test_auto_does_not_look_at_fake_tensors() -> None:
    """A fake tensor raises on any look at its data, as an accelerator would have to synchronise."""
    with FakeTensorMode():
        x = torch.randn(2, 4, 6, 4)
        lengths, ids = torch.tensor([3, 4]), torch.zeros(2, 6, dtype=torch.int64)
        out = sinkhorn_attention(
            x, x, x, torch.zeros(2, 1, 6, 6), query_lengths=lengths, key_lengths=lengths, window=(2, 2), dropout_p=0.1
        )
        assert out.shape == x.shape
        options = {"query_segment_ids": ids, "key_segment_ids": ids, "dustbin": Dustbin(1.0, torch.zeros(4, 1))}
        assert sinkhorn_attention(x, x, x, row_mass=torch.ones(6), **options).shape == x.shape
        assert sinkhorn_plan(x, x, **options).shape == (2, 4, 7, 7)


META = torch.empty(2, 4, 70, 8, device="meta")
META_IDS = torch.empty(2, 70, dtype=torch.int64, device="meta")


@pytest.mark.parametrize(
    "options",
    slow_after(
        1,
        [
            {"window": (9, 9)},
            {"query_lengths": META_IDS[:, 0], "key_lengths": META_IDS[:, 0], "window": (9, 9)},
            {"query_segment_ids": META_IDS, "key_segment_ids": META_IDS, "dustbin": Dustbin(1.0, 0.0)},
            {"gradient": "implicit"},
            {"relaxation": 1.0, "dropout_p": 0.1, "tail_iters": 0},
            {"tolerance": 1e-2, "over_relaxation": 1.3},
            {"tolerance": 1e-2, "acceleration": "chebyshev"},
        ],
    ),
    ids=lambda options: "-".join(options),
)
def test_off_the_cpu_the_tiled_engine_never_looks_at_data(options: dict) -> None:
    """Meta tensors have no data, so any look raises, as it would force an accelerator to synchronise."""
    prepared = prepare(META, META, META, torch.empty(70, 70, device="meta"), **options)
    inputs, problem = prepared.inputs, prepared.problem
    result = tiled.forward(inputs, problem)
    grads = tiled.backward(inputs, problem, result.output, result.potentials, OutputGrads(result.output, mask=True))
    assert [x.shape for x in grads.inputs[:4]] == [META.shape] * 3 + [(1, 1, 70, 70)]
    with pytest.raises(RuntimeError):  # meta tensors do raise
        bool(result.output.sum())


def test_auto_means_the_cpu_and_always_means_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A meta tensor, taken for one with data, stands for an accelerator's."""
    monkeypatch.setattr(checks, "without_data", lambda tensor: False)
    for mode, on_cpu, elsewhere in (("auto", True, False), ("always", True, True), ("never", False, False)):
        set_checks(mode)
        assert checks.data_checks_enabled(X, None) == on_cpu
        assert checks.data_checks_enabled(X, META) == elsewhere


def test_always_and_auto_check_on_the_cpu() -> None:
    for mode in ("auto", "always"):
        set_checks(mode)
        with pytest.raises(ValueError, match="identity"):
            sinkhorn_plan(X, X, window=(-1, 0))


def test_softmax_mode_checks_no_feasibility() -> None:
    assert torch.isfinite(sinkhorn_plan(X, X, window=(-1, 0), base_iters=0, tail_iters=0)).all()
