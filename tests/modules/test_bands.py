"""Weights of a long window, as a band."""

from __future__ import annotations

import pytest
import torch

from torch_sinkhorn_attn import PlanBand, SinkhornMultiheadAttention


def module(**options) -> SinkhornMultiheadAttention:
    torch.manual_seed(0)
    options = {"window": (3, 2), "batch_first": True, "dtype": torch.float64, **options}
    return SinkhornMultiheadAttention(8, 2, **options)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("dustbin", [False, True])
def test_the_band_holds_the_weights(dustbin: bool, average: bool) -> None:
    attention, x = module(dustbin=dustbin), torch.randn(2, 15, 8, dtype=torch.float64)
    padding = torch.arange(15) >= torch.tensor([[15], [11]])
    given = {"key_padding_mask": padding, "average_attn_weights": average}
    output, weights = attention(x, x, x, **given)
    again, band = attention(x, x, x, need_weights="band", **given)
    assert isinstance(band, PlanBand) and band.values.shape == (2, *[2] * (not average), 15, 6)
    assert torch.allclose(output, again) and torch.allclose(band.dense(15), weights, atol=1e-12)
    assert band.row_dustbin is None
    ours, theirs = (torch.autograd.grad(y.square().sum(), attention.in_proj_weight) for y in (band.dense(15), weights))
    assert torch.allclose(ours[0], theirs[0], atol=1e-12)


@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched(batch_first: bool) -> None:
    attention, x = module(batch_first=batch_first), torch.randn(15, 8, dtype=torch.float64)
    _, band = attention(x, x, x, need_weights="band")
    assert band.values.shape == (15, 6) and band.first_column.shape == (15,)
    assert torch.allclose(band.dense(15), attention(x, x, x)[1])


def test_padding_between_keys_widens_the_band() -> None:
    attention, x = module(window=(1, 1)), torch.randn(1, 12, 8, dtype=torch.float64)
    padding = torch.zeros(1, 12, dtype=torch.bool)
    padding[0, 4:7] = True
    _, band = attention(x, x, x, key_padding_mask=padding, need_weights="band")
    assert torch.allclose(band.dense(12), attention(x, x, x, key_padding_mask=padding)[1])


def test_what_cannot_be_a_band_is_refused() -> None:
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="need_weights='bands' must be True, False or 'band'"):
        module()(x, x, x, need_weights="bands")
    with pytest.raises(ValueError, match="sinkhorn_plan_band got window=None"):
        module(window=None)(x, x, x, need_weights="band")
