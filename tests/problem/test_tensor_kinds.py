"""Tensors that are not plain: torch's causal biases are understood, other subclasses and block masks refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention

from torch_sinkhorn_attn import (
    Dustbin,
    SinkhornMultiheadAttention,
    certify,
    sinkhorn_attention,
    sinkhorn_plan,
)

ENGINES = ("reference", "tiled", None)


def qkv(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, 4, generator=g, dtype=torch.float64).to(dtype) for _ in range(3)]


class Odd(Tensor):
    """A subclass nobody knows."""


@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
@pytest.mark.parametrize("sizes", [(5, 5), (4, 6)], ids=str)
def test_causal_biases_of_torch_are_read_as_what_they_stand_for(make, sizes: tuple[int, int]) -> None:
    (q, _, _), (k, v, _) = qkv(2, 2, sizes[0]), qkv(2, 2, sizes[1], seed=1)
    bias = make(*sizes)
    out = sinkhorn_attention(q, k, v, bias, base_iters=0, tail_iters=0)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, bias))
    free = {"dustbin": Dustbin(0.0, 0.0)}
    keep = torch.ones(sizes, dtype=torch.bool).tril(0 if make is causal_upper_left else sizes[1] - sizes[0])
    torch.testing.assert_close(sinkhorn_plan(q, k, bias, **free), sinkhorn_plan(q, k, keep, **free))
    with pytest.raises(ValueError, match=r"attn_mask has shape \(3, 3\)"):
        sinkhorn_plan(q, k, make(3, 3), **free)
    attention, x = SinkhornMultiheadAttention(8, 2, batch_first=True, dustbin=True), torch.randn(1, 5, 8)
    found = attention(x, x, x, attn_mask=make(5, 5))[0]
    torch.testing.assert_close(found, attention(x, x, x, attn_mask=~torch.ones(5, 5).tril().bool())[0])


ARGUMENTS = {
    "query": torch.randn(2, 6, 4), "key": torch.randn(2, 6, 4), "value": torch.randn(2, 6, 4),
    "attn_mask": torch.zeros(6, 6), "query_lengths": torch.tensor(6), "key_lengths": torch.tensor(6),
    "query_segment_ids": torch.zeros(6).long(), "key_segment_ids": torch.zeros(6).long(),
    "row_mass": torch.ones(6), "col_mass": torch.ones(6),
}  # fmt: skip


@pytest.mark.parametrize("name", ARGUMENTS)
def test_other_subclasses_are_refused_everywhere(name: str) -> None:
    given = ARGUMENTS | {name: ARGUMENTS[name].as_subclass(Odd)}
    with pytest.raises(TypeError, match=f"{name} is a Odd, a subclass.*as_subclass"):
        sinkhorn_attention(**given)
    with pytest.raises(TypeError, match=f"{name} has layout torch.sparse_coo.*to_dense"):
        sinkhorn_attention(**(ARGUMENTS | {name: ARGUMENTS[name].to_sparse()}))


def test_other_subclasses_are_refused_in_the_rest() -> None:
    x = ARGUMENTS["query"]
    odd = x.as_subclass(Odd)
    attention = SinkhornMultiheadAttention(4, 2, batch_first=True)
    padding = torch.zeros(2, 6).as_subclass(Odd)
    for call in (
        lambda: Dustbin(odd, 0.0),
        lambda: sinkhorn_plan(x, odd),
        lambda: certify(x, x, value=x, grad_output=odd),
        lambda: sinkhorn_plan(x, x, initial_potentials=(torch.zeros(6).as_subclass(Odd), torch.zeros(6))),
        lambda: attention(odd, odd, odd),
        lambda: attention(x, x, x, key_padding_mask=padding),
        lambda: attention(x, x, x, query_padding_mask=padding.bool()),
        lambda: attention(x, x, x, attn_mask=torch.zeros(6, 6).as_subclass(Odd)),
    ):
        with pytest.raises(TypeError, match=r"is a Odd, a subclass of torch\.Tensor"):
            call()
    parameter, buffer = nn.Parameter(x), nn.Buffer(torch.zeros(6, 6))
    assert sinkhorn_attention(parameter, x, x, buffer).shape == x.shape


def test_block_masks_are_refused_with_what_to_do() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    mask = create_block_mask(lambda b, h, i, j: i >= j, 1, 1, 6, 6, device="cpu")
    x = ARGUMENTS["query"]
    with pytest.raises(TypeError, match=r"BlockMask.*create_mask.*window"):
        sinkhorn_attention(x, x, x, mask)
    with pytest.raises(TypeError, match=r"BlockMask.*create_mask"):
        SinkhornMultiheadAttention(4, 2)(x, x, x, attn_mask=mask)
