"""Dropout: a pure function of seed and entry, fair, independent, and the same in forward, backward and every engine."""

from __future__ import annotations

import pytest
import torch
from conformance import ENGINES
from marks import slow_after

from torch_sinkhorn_attn import sinkhorn_attention
from torch_sinkhorn_attn.method.dropout import keep_tile


def mask(seed: int, heads: int = 4, rows: int = 256, cols: int = 256, p: float = 0.3) -> torch.Tensor:
    words = torch.tensor([seed * 2654435761 % 2**32, seed])
    return keep_tile(words, torch.arange(heads), torch.arange(rows), torch.arange(cols), p).double()


def test_rate_and_independence() -> None:
    for seed in range(5):
        keep = mask(seed)
        deviation = (0.7 * 0.3 / keep.numel()) ** 0.5
        assert abs(keep.mean() - 0.7) < 4.5 * deviation
        centred = (keep - 0.7) / (0.7 * 0.3) ** 0.5
        for lag in ((0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1), (0, 0, 2), (0, 2, 0)):
            a = centred[lag[0] :, lag[1] :, lag[2] :]
            b = centred[: a.shape[0], : a.shape[1], : a.shape[2]]
            assert abs((a * b).mean()) < 4.5 / a.numel() ** 0.5, (seed, lag)
        for axis in (0, 1, 2):  # every head, row and column keeps its share
            share = keep.mean([d for d in range(3) if d != axis])
            spread = (0.21 / (keep.numel() / keep.shape[axis])) ** 0.5
            assert (share - 0.7).abs().max() < 5.5 * spread


def test_tiles_see_the_entries_of_the_whole() -> None:
    words, heads = torch.tensor([7, 9]), torch.arange(3)
    whole = keep_tile(words, heads, torch.arange(40), torch.arange(50), 0.5)
    tile = keep_tile(words, heads, torch.arange(11, 30), torch.arange(7, 50), 0.5)
    assert torch.equal(whole[:, 11:30, 7:50], tile)


@pytest.mark.slow
@pytest.mark.parametrize("engine", slow_after(1, ["reference", *ENGINES]))
def test_manual_seed_governs_and_the_expectation_holds(engine: str) -> None:
    x = torch.randn(1, 2, 12, 4, dtype=torch.float64)
    truth = sinkhorn_attention(x, x, x, engine=engine)
    total = torch.zeros_like(truth)
    draws = 300
    for seed in range(draws):
        torch.manual_seed(seed)
        out = sinkhorn_attention(x, x, x, dropout_p=0.2, engine=engine)
        total += out
        if seed < 3:
            torch.manual_seed(seed)
            assert torch.equal(out, sinkhorn_attention(x, x, x, dropout_p=0.2, engine=engine))
            assert not torch.equal(out, sinkhorn_attention(x, x, x, dropout_p=0.2, engine=engine))
    assert (total / draws - truth).abs().max() < 0.15
