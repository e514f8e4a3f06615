"""choose_settings: what it promises of its settings holds when they are used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from marks import slow_after

from torch_sinkhorn_attn import Dustbin, certify, choose_settings, residual_history, sinkhorn_attention

CASES: dict[str, dict[str, Any]] = {
    "smooth": {},
    "sharp": {"epsilon": 0.2},
    "band": {"window": (8, 8)},
    "padded": {"query_lengths": torch.tensor([20, 48]), "key_lengths": torch.tensor([31, 40])},
    "dustbin": {"dustbin": Dustbin(0.0, 0.0), "epsilon": 0.5},
    "masses": {"row_mass": torch.linspace(0.2, 1.8, 48)},
    "relaxed": {"relaxation": 1.0, "epsilon": 0.5},
    "packed": {
        "query_segment_ids": torch.arange(48).expand(2, -1) // 20,
        "key_segment_ids": torch.arange(48).expand(2, -1) // 20,
    },
}


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 2, 48, 16, generator=g) for _ in range(2))
    return query, key


@pytest.mark.parametrize("name", slow_after(2, CASES))
def test_what_it_promises_holds(name: str) -> None:
    query, key = tokens()
    options = CASES[name]
    found = choose_settings(query, key, **options)
    history = residual_history(query, key, **options, **found.options)
    assert found.balanced and history[..., -1].max() <= 0.01
    assert found.error == pytest.approx(float(history[..., -1].max()))
    assert found.gradient_gap is not None and found.gradient_gap <= 0.05
    fewer = found.options | {"base_iters": found.base_iters // 2}
    if found.base_iters > 6:  # half as many would not have done
        assert residual_history(query, key, **options, **fewer)[..., -1].max() > 0.01
    out = sinkhorn_attention(query, key, torch.randn(2, 2, 48, 4), **options, **found.options)
    assert out.isfinite().all()


def test_certify_has_nothing_to_add() -> None:
    query, key = tokens()
    found = choose_settings(query, key, epsilon=0.07)
    before = certify(query, key, epsilon=0.07, mode="quick")
    after = certify(query, key, epsilon=0.07, mode="quick", **found.options)
    assert before.advice and not after.advice


def test_the_gap_is_that_of_the_gradients_it_chooses_between() -> None:
    """A sharp band's tail gradient is a quarter off: within 5 % asks for a longer tail or the implicit one."""
    query, key = (x[:1, :1].double() for x in tokens())
    loose = choose_settings(query, key, window=(8, 8), epsilon=0.25, gradient_within=10.0)
    tight = choose_settings(query, key, window=(8, 8), epsilon=0.25, gradient_within=1e-6)
    assert loose.gradient == "tail" and loose.tail_iters == 2 and loose.gradient_gap > 0.05
    assert tight.gradient == "implicit" and tight.gradient_gap == 0.0


def test_what_no_iteration_count_balances_is_said() -> None:
    query, key = tokens()
    found = choose_settings(query, key, epsilon=0.005)
    assert not found.balanced and found.error > 0.01 and found.gradient_gap is None
    assert "Use a larger epsilon" in str(found) and "do not balance them" in str(found)


def test_scores_in_place_of_tokens() -> None:
    query, key = tokens()
    scores = query @ key.mT
    direct, by_scores = choose_settings(query, key), choose_settings(scores, scale=0.25)
    assert direct.options == by_scores.options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"base_iters": 3}, "choose_settings chooses base_iters itself: leave it out"),
        ({"windw": 3}, "windw"),
        ({"target": "low"}, "target must be a number"),
    ],
)
def test_bad_input(options: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        choose_settings(*tokens(), **options)


def test_a_target_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"target=0\.0 must be positive"):
        choose_settings(*tokens(), target=0.0)


def test_nothing_to_balance() -> None:
    assert choose_settings(torch.zeros(1, 0, 4), torch.zeros(1, 3, 4)).balanced
