"""The masks and the extra keys of SinkhornMultiheadAttention beside nn.MultiheadAttention: part of PARITY.md."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from parity import SOFTMAX, D, E, H, L, N, S, pair, same, tokens
from torch import Tensor, nn

from torch_sinkhorn_attn import Dustbin, SinkhornMultiheadAttention, sinkhorn_attention

# Masks


@pytest.mark.parametrize("padding_form", ["none", "bool", "float", "soft"])
@pytest.mark.parametrize("form", ["none", "bool", "float", "soft"])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("extra", [False, True])
def test_masks(form: str, padding_form: str, per_head: bool, extra: bool) -> None:
    """Polarity True = ignore; float masks are added; bool and float in any combination, with extra keys or without."""
    options = {"add_bias_kv": extra, "add_zero_attn": extra, "batch_first": True}
    ours, theirs = pair(**options)
    q, k, v = tokens(L, S, S)
    g = torch.Generator().manual_seed(2)
    drop = torch.rand(N * H if per_head else 1, L, S, generator=g) < 0.4
    drop[..., 0] = False
    drop = drop if per_head else drop[0]
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1, 4:] = True

    def given(mask: Tensor, form: str) -> Tensor | None:
        soft = torch.randn(mask.shape, generator=torch.Generator().manual_seed(4), dtype=D)
        as_float = torch.zeros(mask.shape, dtype=D).masked_fill(mask, -torch.inf)
        return {"none": None, "bool": mask, "float": as_float, "soft": soft + as_float}[form]

    masks = {"attn_mask": given(drop, form), "key_padding_mask": given(padding, padding_form)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates masks of two kinds
        for need_weights in (True, False):
            found, truth = (
                m(q, k, v, need_weights=need_weights, average_attn_weights=False, **masks) for m in (ours, theirs)
            )
            assert same(found[0], truth[0]) and same(found[1], truth[1])


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("first", ["zeros", "zeros and -inf", "values"])
@pytest.mark.parametrize("softmax", [True, False])
def test_float_masks_learn(first: str, softmax: bool, need_weights: bool) -> None:
    """From zeros too, as a learned bias begins. (Of a balanced plan a score per key changes nothing.)"""
    ours, theirs = pair(batch_first=True)
    if not softmax:
        theirs = SinkhornMultiheadAttention(E, H, batch_first=True, dtype=D, relaxation=1.0, engine="reference")
        ours = SinkhornMultiheadAttention(E, H, batch_first=True, dtype=D, relaxation=1.0)
        ours.load_state_dict(theirs.state_dict())
    q, k, v = tokens(L, S, S)
    gradients = []
    for module in (ours, theirs):
        padding = torch.zeros(N, S, dtype=D) if first != "values" else torch.linspace(-1, 1, N * S, dtype=D).view(N, S)
        if first == "zeros and -inf":
            padding[1, 5:] = -torch.inf
        masks = [padding.requires_grad_(), torch.zeros(L, S, dtype=D, requires_grad=True)]
        out = module(q, k, v, masks[0], need_weights, masks[1])[0]
        gradients.append(torch.autograd.grad(out.sin().sum(), masks))
    for found, truth in zip(*gradients, strict=True):
        assert same(found, truth.nan_to_num()) and found.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("dtype", "low"),
    [(torch.float32, torch.finfo(torch.float32).min), (torch.float32, -torch.inf), (D, torch.finfo(D).min),
     (D, torch.finfo(torch.float32).min), (torch.float16, torch.finfo(torch.float16).min)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("beside", ["nothing", "float", "half"])
def test_float_masks_forbid_in_their_dtype_or_the_scores(dtype: torch.dtype, low: float, beside: str) -> None:
    """-inf and the lowest numbers, in masks of other dtypes than the module's, alone and added to another mask."""
    module = SinkhornMultiheadAttention(E, H, batch_first=True)
    (x,) = tokens(L, dtype=torch.float32)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    forbid = torch.zeros(L, L, dtype=torch.bool)
    forbid[:, 4] = True
    half = torch.zeros(L, L, dtype=torch.float16)
    other = {
        "nothing": None,
        "float": torch.zeros(L, L).masked_fill(forbid, -torch.inf),
        "half": half.masked_fill(forbid, torch.finfo(torch.float16).min),
    }[beside]
    given = torch.zeros(N, L, dtype=dtype).masked_fill(padding, low)
    given[0, 0] = 0.25  # so that it is not taken for a bool mask
    truth = torch.zeros(N, L).masked_fill(padding, -torch.inf)
    truth[0, 0] = 0.25
    plain = None if other is None else torch.zeros(L, L).masked_fill(forbid, -torch.inf)
    found = module(x, x, x, given, attn_mask=other)[0]
    assert torch.allclose(found, module(x, x, x, truth, attn_mask=plain)[0], atol=1e-6)
    assert torch.equal(found[1, 3:], module.out_proj.bias.expand(2, -1))


def test_overlapping_slices_are_not_self_attention() -> None:
    module = SinkhornMultiheadAttention(E, H, batch_first=True, dtype=D)
    (x,) = tokens(L + 1)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    query, key = x[:, :-1], x[:, 1:]
    found = module(query, key, key, padding)[0]
    assert torch.equal(found, module(query.clone(), key.clone(), key.clone(), padding)[0])
    again = module(key, key.view_as(key), key, padding)[0]  # the same memory is
    assert torch.equal(again, module(key, key, key, padding)[0])


def test_masks_elsewhere_are_refused_by_name() -> None:
    module = SinkhornMultiheadAttention(E, H, batch_first=True, dtype=D)
    (x,) = tokens(L)
    for name, shape in (("key_padding_mask", (N, L)), ("query_padding_mask", (N, L)), ("attn_mask", (L, L))):
        with pytest.raises(ValueError, match=f"{name} is on meta but the query on cpu"):
            module(x, x, x, **{name: torch.zeros(shape, dtype=torch.bool, device="meta")})


def test_equivalent_options_are_one() -> None:
    def options(**given: Any) -> Any:
        return SinkhornMultiheadAttention(E, H, **given).options

    assert options(window=[2, 2]) == options(window=(2, 2)) and options(relaxation=(1.0, 1.0)) == options(
        relaxation=1.0
    )
    balanced = SinkhornMultiheadAttention(E, H, relaxation=(None, float("inf")), **SOFTMAX)
    assert balanced.softmax_mode and balanced.relaxation is None


def test_unbatched_padding() -> None:
    ours, theirs = pair()
    q, k, v = (x[0] for x in tokens(L, S, S))
    padding = torch.tensor([False] * 5 + [True] * 2)
    for a, b in zip(ours(q, k, v, padding), theirs(q, k, v, padding), strict=True):
        assert same(a, b)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_is_causal_is_a_hint(need_weights: bool, padded: bool) -> None:
    ours, theirs = pair(batch_first=True)
    (x,) = tokens(L)
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=D)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    for hint in (True, False):
        found, truth = (
            m(x, x, x, padding, need_weights=need_weights, attn_mask=causal, is_causal=hint) for m in (ours, theirs)
        )
        assert same(found[0], truth[0]) and same(found[1], truth[1])
    for module in (ours, theirs):
        with pytest.raises((ValueError, RuntimeError), match=r"[Nn]eed attn_mask|hint about attn_mask"):
            module(x, x, x, is_causal=True, need_weights=False)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("iters", [(0, 0), (20, 2)])
@pytest.mark.parametrize("how", ["bool", "float", "all keys padded"])
def test_fully_masked_rows_are_zero_before_the_projection(how: str, iters: tuple[int, int], need_weights: bool) -> None:
    """Where torch gives NaN."""
    module = SinkhornMultiheadAttention(E, H, batch_first=True, dtype=D, base_iters=iters[0], tail_iters=iters[1])
    nn.init.normal_(module.out_proj.bias)
    q, k, v = (x.requires_grad_() for x in tokens(L, S, S))
    if how == "all keys padded":
        padding = torch.zeros(N, S, dtype=torch.bool)
        padding[1] = True
        masks, row = {"key_padding_mask": padding}, (1, slice(None))
    else:
        drop = torch.zeros(L, S, dtype=torch.bool)
        drop[2] = True
        drop_float = torch.zeros(L, S, dtype=D).masked_fill(drop, -torch.inf)
        masks, row = {"attn_mask": drop if how == "bool" else drop_float}, (slice(None), 2)
    out, weights = module(q, k, v, need_weights=need_weights, **masks)
    assert (out[row] == module.out_proj.bias).all() and (weights is None or (weights[row] == 0).all())
    gradients = torch.autograd.grad(out.sin().sum(), (q, k, v, *module.parameters()))
    assert all(g.isfinite().all() for g in gradients) and (gradients[0][row] == 0).all()
    theirs = nn.MultiheadAttention(E, H, batch_first=True, dtype=D)
    assert theirs(q, k, v, need_weights=True, **masks)[0].isnan().any()


# Extra keys


@pytest.mark.parametrize("kind", ["add_bias_kv", "add_zero_attn"])
def test_extra_keys_are_keys_like_any_other_with_a_dustbin_too(kind: str) -> None:
    """Visible to every query, with a unit share, left to the dustbin at the head's dustbin_col_score."""
    module = SinkhornMultiheadAttention(E, H, batch_first=True, dtype=D, dustbin=True, **{kind: True})
    nn.init.normal_(module.dustbin_row_score)
    nn.init.normal_(module.dustbin_col_score)
    (x,) = tokens(L)
    mask = torch.eye(L, dtype=torch.bool)
    weights = [*module.in_proj_weight.chunk(3)]
    q, k, v = (x @ w.T + b for w, b in zip(weights, module.in_proj_bias.chunk(3), strict=True))
    extra = (module.bias_k, module.bias_v) if kind == "add_bias_kv" else (k.new_zeros(1, 1, E), k.new_zeros(1, 1, E))
    k, v = (torch.cat([y, e.expand(N, 1, E)], 1) for y, e in zip((k, v), extra, strict=True))
    heads = [y.unflatten(-1, (H, E // H)).transpose(1, 2) for y in (q, k, v)]
    dustbin = Dustbin(module.dustbin_row_score, module.dustbin_col_score)
    keep = torch.cat([~mask, torch.ones(L, 1, dtype=torch.bool)], -1)
    truth = sinkhorn_attention(*heads, keep, dustbin=dustbin).transpose(1, 2).flatten(-2)
    truth = nn.functional.linear(truth, module.out_proj.weight, module.out_proj.bias)
    found, shown = module(x, x, x, attn_mask=mask)
    assert torch.allclose(found, truth, atol=1e-12) and shown.shape == (N, L, L + 1)
    assert torch.allclose(module(x, x, x, attn_mask=mask, need_weights=False)[0], truth, atol=1e-12)
