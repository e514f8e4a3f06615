"""The attentions that are compared: each plan against its formula, written out entry by entry."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from examples.pfam.attentions import ATTENTIONS, AttentionProblem
from examples.pfam.config import Config
from examples.pfam.evaluate import unpad
from examples.pfam.model import Aligner
from examples.pfam.pairs import Pair, encode
from examples.pfam.sampler import Batch, collate
from torch_sinkhorn_attn import Dustbin

N, M = (4, 6), (7, 5)
"""Lengths of the two pairs in the batch, padded to 6 and 7."""


def problem(attention: str, **options: Any) -> AttentionProblem:
    generator = torch.manual_seed(0)
    query, key = torch.randn(2, 1, 6, 3, generator=generator), torch.randn(2, 1, 7, 3, generator=generator)
    mask, row, col = (torch.randn(2, 1, *shape, generator=generator) for shape in ((6, 7), (6,), (7,)))
    lengths = {"query_lengths": torch.tensor(N), "key_lengths": torch.tensor(M)}
    return AttentionProblem(
        query, key, mask, {"scale": 1.0, "dustbin": Dustbin(row, col), **lengths, **options}, attention
    )


def parts(asked: AttentionProblem, pair: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores [n, m] and dustbin scores [n], [m] of one pair without its padding."""
    n, m, dustbin = N[pair], M[pair], asked.options["dustbin"]
    assert asked.attn_mask is not None
    scores = asked.query[pair, 0, :n] @ asked.key[pair, 0, :m].T + asked.attn_mask[pair, 0, :n, :m]
    return scores, dustbin.row_score[pair, 0, :n], dustbin.col_score[pair, 0, :m]


@pytest.mark.parametrize("pair", [0, 1])
def test_softmax(pair: int) -> None:
    asked = problem("softmax")
    plan = torch.from_numpy(unpad(asked.plan()[pair].numpy(), N[pair], M[pair]))
    scores, to_bin, _ = parts(asked, pair)
    expected = torch.cat([scores, to_bin[:, None]], dim=1).softmax(dim=1)
    torch.testing.assert_close(plan[:-1], expected)
    for j in range(M[pair]):
        untaken = 1.0
        for i in range(N[pair]):
            untaken *= 1 - float(expected[i, j])
        assert float(plan[-1, j]) == pytest.approx(untaken, abs=1e-5)


@pytest.mark.parametrize("pair", [0, 1])
def test_dual_softmax(pair: int) -> None:
    asked = problem("dual-softmax")
    plan = torch.from_numpy(unpad(asked.plan()[pair].numpy(), N[pair], M[pair]))
    scores, to_bin, from_bin = parts(asked, pair)
    rows = torch.cat([scores, to_bin[:, None]], dim=1).softmax(dim=1)
    columns = torch.cat([scores, from_bin[None]], dim=0).softmax(dim=0)
    torch.testing.assert_close(plan[:-1, :-1], (rows[:, :-1] * columns[:-1]).sqrt())
    torch.testing.assert_close(plan[:-1, -1], rows[:, -1])
    torch.testing.assert_close(plan[-1, :-1], columns[-1])


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_nothing_on_padding_and_finite_gradients(attention: str) -> None:
    asked = problem(attention)
    asked.query.requires_grad_()
    plan = asked.plan()
    assert plan.shape == (2, 7, 8)
    for pair in (0, 1):
        assert not plan[pair, N[pair] : -1].any() and not plan[pair, :, M[pair] : -1].any()
    plan.clamp_min(1e-30).log().sum().backward()
    assert asked.query.grad is not None and asked.query.grad.isfinite().all()
    assert not asked.query.grad[0, 0, N[0] :].any()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_one_window_for_all(attention: str) -> None:
    """The same entries are open, whatever the normalisation."""
    asked = problem(attention, window=(1, 2))
    plan = asked.plan()
    for pair in (0, 1):
        n, m = N[pair], M[pair]
        for i in range(n):
            for j in range(m):
                inside = -1 <= j - ((i + 0.5) * m / n - 0.5) <= 2
                assert bool(plan[pair, i, j] > 0) == inside


def batch() -> Batch:
    pairs = [("MKVLA", "MKLA"), ("MKVLAWWGH", "MKVLAGHPDEA")]
    return collate([Pair("F", ("a", "b"), encode(a), encode(b), torch.zeros(0, 2).long().numpy()) for a, b in pairs])


def test_the_papers_dustbin_takes_one_residue() -> None:
    torch.manual_seed(0)
    model = Aligner(Config(dim=24, capacity="one", base_iters=200)).eval()
    with torch.no_grad():
        plans = model(batch())[1]
    for plan, n, m in zip(plans, (5, 9), (4, 11), strict=True):
        found = torch.from_numpy(unpad(plan.numpy(), n, m))
        torch.testing.assert_close(found.sum(1), torch.ones(n + 1), atol=1e-3, rtol=0)
        torch.testing.assert_close(found.sum(0)[:-1], torch.full((m,), n / m), atol=1e-2, rtol=0)
        assert float(found.sum(0)[-1]) == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("setting", [{"gradient": "tail"}, {"gradient": "unrolled"}, {"relaxation": 2.0}])
def test_settings_reach_the_attention(setting: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Aligner(Config(dim=24, **setting))
    ((name, value),) = setting.items()
    with torch.no_grad():
        solved = model.solve(batch())
    assert all(asked.options[name] == value for asked, _ in solved)
    assert all(plan.isfinite().all() for _, plan in solved)
    with pytest.raises(ValueError, match="--gradient must be one of tail, implicit, unrolled, got 'none'"):
        Config(gradient="none")
