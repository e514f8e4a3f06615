"""SinkhornMultiheadAttention beside torch 2.9's nn.MultiheadAttention, item by item: tests/PARITY.md lists them.

Ideas from torch's own tests of the module (test_multihead_attention.py, test_native_mha.py, test_transformers.py),
written anew. Softmax mode (T = R = 0) must equal nn.MultiheadAttention; what does not depend on it runs by default.
"""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_sinkhorn_attn import Dustbin, SinkhornMultiheadAttention, sinkhorn_attention

D = torch.float64
N, L, S, E, H = 2, 5, 7, 12, 3
SOFTMAX = {"base_iters": 0, "tail_iters": 0}
CONSTRUCTORS: list[dict[str, Any]] = [
    dict(zip(("bias", "add_bias_kv", "add_zero_attn", "kdim", "vdim"), values, strict=True))
    for values in itertools.product((True, False), (False, True), (False, True), (None, E, 5), (None, 4))
]


def pair(dtype: torch.dtype = D, **options: Any) -> tuple[SinkhornMultiheadAttention, nn.MultiheadAttention]:
    """Ours in softmax mode and torch's, from one seed."""
    torch.manual_seed(3)
    ours = SinkhornMultiheadAttention(E, H, dtype=dtype, **options, **SOFTMAX)
    torch.manual_seed(3)
    return ours, nn.MultiheadAttention(E, H, dtype=dtype, **options)


def tokens(*lengths: int, dtype: torch.dtype = D, width: int = E) -> list[Tensor]:
    """Batch-first tokens `[N, length, width]`."""
    g = torch.Generator().manual_seed(1)
    return [torch.randn(N, n, width, generator=g, dtype=D).to(dtype) for n in lengths]


def same(found: Any, truth: Any, atol: float = 1e-12) -> bool:
    """Values, shapes, dtypes; None for None."""
    if found is None or truth is None:
        return found is truth
    return found.shape == truth.shape and found.dtype == truth.dtype and torch.allclose(found, truth, atol=atol)


# The class


def test_constructor_and_forward_have_torch_s_arguments_in_torch_s_order() -> None:
    for name in ("__init__", "forward"):
        theirs = list(inspect.signature(getattr(nn.MultiheadAttention, name)).parameters.values())
        ours = list(inspect.signature(getattr(SinkhornMultiheadAttention, name)).parameters.values())
        assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [
            (p.name, p.default, p.kind) for p in theirs
        ]
        assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


def test_is_an_nn_multihead_attention() -> None:
    assert isinstance(SinkhornMultiheadAttention(E, H), nn.MultiheadAttention)


@pytest.mark.parametrize("options", CONSTRUCTORS, ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()))
def test_attributes_parameters_and_initial_weights(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    ours = SinkhornMultiheadAttention(E, H, 0.25, batch_first=True, **options)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, H, 0.25, batch_first=True, **options)
    assert torch.equal(torch.get_rng_state(), state)
    for name in (
        "embed_dim",
        "num_heads",
        "head_dim",
        "kdim",
        "vdim",
        "dropout",
        "batch_first",
        "add_zero_attn",
        "training",
    ):
        assert getattr(ours, name) == getattr(theirs, name)
    added = {"dustbin_row_score": None, "dustbin_col_score": None}
    assert {k: v is None for k, v in ours._parameters.items() if k not in added} == {
        k: v is None for k, v in theirs._parameters.items()
    }
    assert all(ours._parameters[name] is None for name in added)
    assert type(ours.out_proj) is type(theirs.out_proj)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b)


def test_only_the_fast_path_s_flag_differs() -> None:
    ours, theirs = pair()
    assert not ours._qkv_same_embed_dim and theirs._qkv_same_embed_dim
    own = {"_replaced_by_sinkhorn", *inspect.signature(SinkhornMultiheadAttention).parameters}
    assert vars(theirs).keys() - {"_qkv_same_embed_dim"} <= vars(ours).keys()
    assert vars(ours).keys() - vars(theirs).keys() <= own


@pytest.mark.parametrize("arguments", [(0, 1), (12, 0), (12, 5), (-12, 3)])
def test_impossible_sizes_are_refused_as_torch_does(arguments: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"embed_dim=.* must be a positive multiple"):
        SinkhornMultiheadAttention(*arguments)
    with pytest.raises((ValueError, AssertionError)):
        nn.MultiheadAttention(*arguments)


# Checkpoints


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 5, "vdim": 4}, {"add_bias_kv": True}], ids=str)
def test_state_dicts_load_both_ways(options: dict[str, Any]) -> None:
    ours, theirs = SinkhornMultiheadAttention(E, H, **options), nn.MultiheadAttention(E, H, **options)
    assert not torch.equal(ours.out_proj.weight, theirs.out_proj.weight)
    ours.load_state_dict(theirs.state_dict())
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    again = nn.MultiheadAttention(E, H, **options)
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again.out_proj.weight, theirs.out_proj.weight)


def test_checkpoints_without_dustbin_scores_load_strictly_and_keep_them() -> None:
    ours = nn.ModuleDict({"a": SinkhornMultiheadAttention(E, H, dustbin=True)})
    nn.init.constant_(ours["a"].dustbin_row_score, 3.0)
    ours.load_state_dict(nn.ModuleDict({"a": nn.MultiheadAttention(E, H)}).state_dict())
    assert (ours["a"].dustbin_row_score == 3).all()
    state = ours.state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*dustbin_row_score"):  # they would be lost
        nn.ModuleDict({"a": nn.MultiheadAttention(E, H)}).load_state_dict(state)
    del state["a.dustbin_row_score"]
    with pytest.raises(RuntimeError, match=r"Missing key.*dustbin_row_score"):  # half of them is a mistake
        ours.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*dustbin_row_score"):
        ours.load_state_dict({})
    plain, parametrised = nn.MultiheadAttention(E, H), SinkhornMultiheadAttention(E, H, dustbin=True)
    for module in (plain, parametrised):
        torch.nn.utils.parametrizations.weight_norm(module.out_proj)
    parametrised.load_state_dict(plain.state_dict())
    with torch.device("meta"):
        meta = SinkhornMultiheadAttention(E, H, dustbin=True)
    with pytest.raises(RuntimeError, match=r"Missing key.*dustbin_row_score"):  # they have no values to keep
        meta.load_state_dict(nn.MultiheadAttention(E, H).state_dict(), assign=True)


def test_modules_pickled_before_torch_1_1_had_a_flag_less() -> None:
    ours, theirs = pair()
    for module in (ours, theirs):
        state = module.__dict__.copy()
        state.pop("_qkv_same_embed_dim", None)
        other = type(module).__new__(type(module))
        other.__setstate__(state)
        assert other._qkv_same_embed_dim == module._qkv_same_embed_dim
        x = tokens(L)[0]
        assert torch.equal(other(x, x, x)[0], module(x, x, x)[0])


@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 4}, {"dustbin": True}, {"add_bias_kv": True}], ids=str)
def test_copies(options: dict[str, Any]) -> None:
    module = SinkhornMultiheadAttention(E, H, batch_first=True, dtype=D, epsilon=0.7, **options)
    q, k, v = tokens(L, S, S)
    k, v = k[..., : module.kdim], v[..., : module.vdim]
    truth = module(q, k, v)[0]
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False))
    for other in copies:
        assert torch.equal(other(q, k, v)[0], truth) and other.epsilon == 0.7
        assert other.out_proj.weight is not module.out_proj.weight


# Layouts


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("layout", ["unbatched", "sequence first", "batch first"])
def test_layouts(layout: str, average: bool, need_weights: bool) -> None:
    ours, theirs = pair(batch_first=layout == "batch first")
    inputs = tokens(L, S, S)
    if layout != "batch first":
        inputs = [x[0] if layout == "unbatched" else x.transpose(0, 1) for x in inputs]
    found, truth = (m(*inputs, need_weights=need_weights, average_attn_weights=average) for m in (ours, theirs))
    assert same(found[0], truth[0]) and same(found[1], truth[1])


@pytest.mark.parametrize("options", [{}, {"kdim": 5}, {"vdim": 4}, {"kdim": 5, "vdim": 4, "bias": False}], ids=str)
def test_kdim_and_vdim(options: dict[str, Any]) -> None:
    ours, theirs = pair(batch_first=True, **options)
    q, k, v = tokens(L, S, S)
    k, v = k[..., : ours.kdim], v[..., : ours.vdim]
    for a, b in zip(ours(q, k, v), theirs(q, k, v), strict=True):
        assert same(a, b)


def test_non_contiguous_and_expanded_inputs() -> None:
    ours, theirs = pair(batch_first=True)
    x = torch.randn(L, E, 2 * N, dtype=D).permute(2, 0, 1)[::2]
    key = torch.randn(1, 1, E, dtype=D).expand(N, S, E)
    assert same(ours(x, key, key)[0], theirs(x, key, key)[0])


def test_empty_batches() -> None:
    ours, theirs = pair(batch_first=True)
    x = torch.zeros(0, L, E, dtype=D)
    for a, b in zip(ours(x, x, x), theirs(x, x, x), strict=True):
        assert same(a, b)


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


# Dropout


def test_dropout_matches_in_distribution() -> None:
    """Weights are dropped with probability p and scaled by 1 / (1 - p), in training only, as torch's are."""
    p = 0.25
    ours, theirs = pair(dropout=p, batch_first=True)
    q, k, v = tokens(L, S, S)
    clean = theirs.eval()(q, k, v, average_attn_weights=False)[1]
    assert same(ours.eval()(q, k, v, average_attn_weights=False)[1], clean)
    for module in (ours.train(), theirs.train()):
        drawn = torch.stack([module(q, k, v, average_attn_weights=False)[1] for _ in range(300)])
        kept = drawn != 0
        assert abs(kept.double().mean() - (1 - p)) < 0.01
        assert torch.allclose(drawn[kept], (clean / (1 - p)).expand_as(drawn)[kept], atol=1e-12)
    mean = torch.stack([ours(q, k, v, need_weights=False)[0] for _ in range(3000)]).mean(0)
    assert (mean - ours.eval()(q, k, v)[0]).abs().max() < 0.05


# Dtypes and devices


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("need_weights", [True, False])
def test_half_modules(dtype: torch.dtype, need_weights: bool) -> None:
    ours, theirs = pair(dtype=dtype, batch_first=True)
    inputs = tokens(L, S, S, dtype=dtype)
    found, truth = (m(*inputs, need_weights=need_weights) for m in (ours, theirs))
    assert same(found[0], truth[0], 20 * torch.finfo(dtype).eps) and same(
        found[1], truth[1], 20 * torch.finfo(dtype).eps
    )
    found[0].sum().backward()
    truth[0].sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.grad.dtype == dtype and torch.allclose(a.grad, b.grad, atol=0.1 if dtype != torch.float32 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "mask", [None, torch.zeros(L, S), torch.eye(L, S, dtype=torch.bool)], ids=["no", "float", "bool"]
)
def test_autocast(dtype: torch.dtype, need_weights: bool, mask: Tensor | None) -> None:
    ours, theirs = pair(dtype=torch.float32, batch_first=True)
    inputs = tokens(L, S, S, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        found, truth = (m(*inputs, need_weights=need_weights, attn_mask=mask) for m in (ours, theirs))
    assert same(found[0], truth[0], 20 * torch.finfo(dtype).eps) and same(
        found[1], truth[1], 20 * torch.finfo(dtype).eps
    )
    found[0].float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in ours.parameters())


def test_meta_modules() -> None:
    with torch.device("meta"):
        module = SinkhornMultiheadAttention(E, H, batch_first=True, dustbin=True, add_bias_kv=True)
        x = torch.empty(N, L, E)
        padding = torch.empty(N, L, dtype=torch.bool)
    out, weights = module(x, x, x, padding)
    assert out.is_meta and out.shape == x.shape and weights.shape == (N, L, L + 1)
    module.to_empty(device="cpu").out_proj.reset_parameters()
    module._reset_parameters()
    assert module(*[torch.randn(N, L, E)] * 3)[0].isfinite().all()


def test_to_casts_dustbin_scores_with_the_rest() -> None:
    module = SinkhornMultiheadAttention(E, H, dustbin=True).half()
    assert {p.dtype for p in module.parameters()} == {torch.float16}
    module = SinkhornMultiheadAttention(E, H, dustbin=True, dtype=torch.bfloat16, device="meta")
    assert module.dustbin_row_score.dtype == torch.bfloat16 and module.dustbin_row_score.is_meta


# Nested tensors


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout: torch.layout) -> None:
    parts = [torch.randn(n, E, dtype=D) for n in (3, 5)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, says torch
        x = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
    ours = SinkhornMultiheadAttention(E, H, batch_first=True, dtype=D, window=(3, 3))
    out, weights = ours(x, x, x)
    assert out.is_nested and out.layout == layout and weights.shape == (2, 5, 5)
    for found, part in zip(out.unbind(), parts, strict=True):
        assert torch.allclose(found, ours(part, part, part)[0], atol=1e-12)
    assert (weights[0, 3:] == 0).all() and (weights[0, :, 3:] == 0).all()
    assert (x + out).is_nested  # the residual connection of a layer
    torch.nested.to_padded_tensor(out, 0.0).sin().sum().backward()
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in x.grad.unbind())
    memory = torch.nested.nested_tensor([torch.randn(n, E, dtype=D) for n in (4, 2)], layout=layout)
    cross = ours(x, memory, memory, need_weights=False)[0].unbind()
    truth = ours(parts[1], memory.unbind()[1], memory.unbind()[1])[0]
    assert torch.allclose(cross[1], truth, atol=1e-12)


def test_nested_tensors_in_softmax_mode_are_torch_s() -> None:
    ours = SinkhornMultiheadAttention(E, 4, batch_first=True, dtype=D, **SOFTMAX)
    theirs = nn.MultiheadAttention(E, 4, batch_first=True, dtype=D)  # takes them for an even number of heads only
    theirs.load_state_dict(ours.state_dict())
    x = torch.nested.nested_tensor([torch.randn(n, E, dtype=D) for n in (3, 5)])
    with torch.no_grad():
        (found, weights), (truth, theirs_weights) = (m.eval()(x, x, x) for m in (ours, theirs))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found.unbind(), truth.unbind(), strict=True))
    assert torch.allclose(weights, theirs_weights, atol=1e-12)


def test_nested_tensors_refused_with_advice() -> None:
    x = torch.nested.nested_tensor([torch.randn(n, E) for n in (3, 5)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"must all be nested, and the module batch_first.*enable_nested_tensor=False"):
        SinkhornMultiheadAttention(E, H)(x, x, x)
    module, dense = SinkhornMultiheadAttention(E, H, batch_first=True), torch.randn(2, 5, E)
    with pytest.raises(TypeError, match="must all be nested"):
        module(dense, x, x)
    other = torch.nested.nested_tensor([torch.randn(n, E) for n in (5, 3)], layout=torch.jagged)
    with pytest.raises(ValueError, match=r"key and value must have equal lengths.*3, 5.*5, 3"):
        module(x, x, other)
    with pytest.raises(TypeError, match=r"with holes.*x\.contiguous\(\)"):
        holes = torch.nested.narrow(dense, 1, torch.tensor([0, 1]), torch.tensor([3, 4]), layout=torch.jagged)
        module(holes, holes, holes)
    ragged = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(4, E - 2)])
    with pytest.raises(ValueError, match="must have one number of features"):
        module(ragged, ragged, ragged)
    with pytest.raises(ValueError, match="pass no mask with them"):
        module(x, x, x, key_padding_mask=torch.zeros(2, 5, dtype=torch.bool))


# The rest


def test_scripting_is_refused_with_advice() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TypeError, match=r"torch\.compile or torch\.export"):
            torch.jit.script(SinkhornMultiheadAttention(E, H))


def test_every_item_of_the_table_has_its_test() -> None:
    """And every test of this file its item."""
    folder = Path(__file__).parent
    table = (folder / "PARITY.md").read_text()
    named = {part for part in table.split("`") if part.startswith("test_") and not part.endswith(".py")}
    source = "".join(path.read_text() for path in folder.glob("test_*.py"))
    assert not [name for name in named if f"def {name}(" not in source]
    here = {name for name in globals() if name.startswith("test_")} - {"test_every_item_of_the_table_has_its_test"}
    assert not here - named
