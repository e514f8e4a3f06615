"""SinkhornMultiheadAttention: layouts, padding, masks, the dustbin, and softmax mode against PyTorch."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn

from torch_sinkhorn_attn import SinkhornMultiheadAttention, sinkhorn_attention

D = torch.float64
N, L, S, E, H = 2, 5, 7, 12, 3


def pair(**options) -> tuple[SinkhornMultiheadAttention, nn.MultiheadAttention]:
    """Ours in softmax mode and PyTorch's, from one seed."""
    made = []
    for cls, extra in ((SinkhornMultiheadAttention, {"base_iters": 0, "tail_iters": 0}), (nn.MultiheadAttention, {})):
        torch.manual_seed(3)
        made.append(cls(E, H, dtype=D, **options, **extra))
    return made[0], made[1]


def inputs(batch_first: bool, self_attention: bool = False, kdim: int = E, vdim: int = E) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)

    def tokens(n: int, width: int) -> Tensor:
        x = torch.randn(N, n, width, generator=g, dtype=D)
        return (x if batch_first else x.transpose(0, 1)).contiguous().requires_grad_()

    if self_attention:
        x = tokens(L, E)
        return [x, x, x]
    return [tokens(L, E), tokens(S, kdim), tokens(S, vdim)]


PADDING = torch.tensor([[False] * 7, [False, False, True, False, False, True, True]])
OPTIONS = [
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 5, "vdim": 4},
    {"batch_first": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("mask", ["none", "bool", "float", "per head", "padding", "float padding", "padding and mask"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_softmax_mode_is_nn_multihead_attention(options: dict, mask: str, need_weights: bool) -> None:
    ours, theirs = pair(**options)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    q, k, v = inputs(options.get("batch_first", False), kdim=options.get("kdim", E), vdim=options.get("vdim", E))
    g = torch.Generator().manual_seed(2)
    drop = torch.rand(L, S, generator=g) < 0.3
    drop[:, 0] = False
    masks = {
        "none": {},
        "bool": {"attn_mask": drop},
        "float": {"attn_mask": torch.randn(L, S, generator=g, dtype=D)},
        "per head": {"attn_mask": torch.randn(N * H, L, S, generator=g, dtype=D)},
        "padding": {"key_padding_mask": PADDING},
        "float padding": {"key_padding_mask": torch.zeros(N, S, dtype=D).masked_fill(PADDING, -torch.inf)},
        "padding and mask": {"key_padding_mask": PADDING, "attn_mask": drop},
    }[mask]
    results = []
    for module in (ours, theirs):
        out, weights = module(q, k, v, need_weights=need_weights, average_attn_weights=False, **masks)
        gradients = torch.autograd.grad(out.sin().sum(), (q, k, v, *module.parameters()))
        results.append([out, *([] if weights is None else [weights]), *gradients])
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["unbatched", "seq first", "batch first"])
def test_layouts_agree(kind: str, need_weights: bool) -> None:
    module = SinkhornMultiheadAttention(E, H, dtype=D, batch_first=kind == "batch first")
    q, k, v = inputs(batch_first=True)
    reference = SinkhornMultiheadAttention(E, H, dtype=D, batch_first=True)
    reference.load_state_dict(module.state_dict())
    truth, weights = reference(q, k, v, need_weights=need_weights)
    if kind == "unbatched":
        out, own = module(q[0], k[0], v[0], need_weights=need_weights)
        truth, weights = truth[0], None if weights is None else weights[0]
    elif kind == "seq first":
        out, own = module(*(x.transpose(0, 1) for x in (q, k, v)), need_weights=need_weights)
        out = out.transpose(0, 1)
    else:
        out, own = module(q, k, v, need_weights=need_weights)
    assert torch.allclose(out, truth, atol=1e-13)
    assert (own is None) == (weights is None) and (own is None or torch.allclose(own, weights, atol=1e-13))


@pytest.mark.parametrize("dustbin", [False, True])
@pytest.mark.parametrize("window", [None, (6, 6)])
def test_module_is_the_functional_between_projections(dustbin: bool, window) -> None:
    module = SinkhornMultiheadAttention(E, H, dtype=D, batch_first=True, dustbin=dustbin, window=window, bias=False)
    q, k, v = inputs(batch_first=True)
    weights = module.in_proj_weight.chunk(3)
    heads = [(x @ w.T).unflatten(-1, (H, E // H)).transpose(1, 2) for x, w in zip((q, k, v), weights, strict=True)]
    from torch_sinkhorn_attn import Dustbin

    options = {"dustbin": Dustbin(module.dustbin_row_score, module.dustbin_col_score)} if dustbin else {}
    truth = sinkhorn_attention(*heads, window=window, **options).transpose(1, 2).flatten(-2) @ module.out_proj.weight.T
    for need_weights in (True, False):
        assert torch.allclose(module(q, k, v, need_weights=need_weights)[0], truth, atol=1e-12)


def test_columns_are_balanced_and_weights_average_over_heads() -> None:
    module = SinkhornMultiheadAttention(E, H, dtype=D, batch_first=True, base_iters=200)
    q, k, v = inputs(batch_first=True)
    mean = module(q, k, v)[1]
    each = module(q, k, v, average_attn_weights=False)[1]
    assert mean.shape == (N, L, S) and each.shape == (N, H, L, S) and torch.allclose(each.mean(1), mean)
    assert torch.allclose(each.sum(-2), torch.full((N, H, S), L / S, dtype=D), atol=1e-8)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("form", ["bool", "float"])
def test_padded_self_attention_is_the_unpadded_problem(need_weights: bool, form: str) -> None:
    module = SinkhornMultiheadAttention(E, H, dtype=D, batch_first=True, window=(2, 2))
    x = inputs(batch_first=True, self_attention=True)[0]
    padding = torch.tensor([[False] * 5, [True, False, False, False, True]])
    given = padding if form == "bool" else torch.zeros(N, L, dtype=D).masked_fill(padding, -torch.inf)
    out, weights = module(x, x, x, key_padding_mask=given, need_weights=need_weights)
    part = x[1:, 1:4]
    alone, alone_weights = module(part, part, part)
    assert torch.allclose(out[1:, 1:4], alone, atol=1e-13)
    assert torch.allclose(out[1, [0, 4]], module.out_proj.bias.expand(2, -1))  # inactive: exactly zero before out_proj
    if weights is not None:
        assert torch.allclose(weights[1:, 1:4, 1:4], alone_weights, atol=1e-13) and (weights[1, 0] == 0).all()
    (grad,) = torch.autograd.grad(out.sin().sum(), x)
    assert torch.isfinite(grad).all() and (grad[1, [0, 4]] == 0).all()


def test_query_padding_overrides_the_inference() -> None:
    module = SinkhornMultiheadAttention(E, H, dtype=D, batch_first=True)
    x = inputs(batch_first=True, self_attention=True)[0]
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    same = module(x, x, x, key_padding_mask=padding)[0]
    copied = x.clone()
    assert torch.equal(module(x, copied, copied, padding, query_padding_mask=padding)[0], same)
    keep = module(x, x, x, padding, query_padding_mask=torch.zeros_like(padding))[0]
    assert not torch.allclose(keep, same)


def test_softmax_mode_keeps_padded_queries_active() -> None:
    ours, theirs = pair(batch_first=True)
    x = inputs(batch_first=True, self_attention=True)[0]
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    assert torch.allclose(ours(x, x, x, padding)[0], theirs(x, x, x, padding)[0], atol=1e-13)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("iters", [(0, 0), (20, 2)])
def test_a_fully_masked_row_is_the_bias_and_has_finite_gradients(need_weights: bool, iters: tuple[int, int]) -> None:
    module = SinkhornMultiheadAttention(E, H, dtype=D, batch_first=True, base_iters=iters[0], tail_iters=iters[1])
    nn.init.normal_(module.out_proj.bias)
    q, k, v = inputs(batch_first=True)
    mask = torch.zeros(L, S, dtype=torch.bool)
    mask[2] = True
    out = module(q, k, v, attn_mask=mask, need_weights=need_weights)[0]
    assert torch.equal(out[:, 2], module.out_proj.bias.expand(N, -1))
    gradients = torch.autograd.grad(out.sin().sum(), (q, k, v, *module.parameters()))
    assert all(torch.isfinite(g).all() for g in gradients) and (gradients[0][:, 2] == 0).all()


def test_the_encoder_layer_calls_our_forward_in_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.TransformerEncoderLayer(E, H, 16, batch_first=True, dtype=D)
    layer.self_attn = SinkhornMultiheadAttention(E, H, batch_first=True, dtype=D)
    calls = []
    original = SinkhornMultiheadAttention.forward
    monkeypatch.setattr(SinkhornMultiheadAttention, "forward", lambda *a, **k: calls.append(1) or original(*a, **k))
    x = inputs(batch_first=True, self_attention=True)[0]
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    results = []
    for train, grad in itertools.product((True, False), repeat=2):
        layer.train(train)
        layer.dropout.p = layer.dropout1.p = layer.dropout2.p = layer.self_attn.dropout = 0.0
        with torch.set_grad_enabled(grad):
            results.append(layer(x, src_key_padding_mask=padding))
    assert len(calls) == 4 and all(torch.allclose(results[0], r, atol=1e-13) for r in results)


def test_causal_requests_say_why_or_work() -> None:
    q = inputs(batch_first=True, self_attention=True)[0]
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)
    balanced = SinkhornMultiheadAttention(E, H, dtype=D, batch_first=True)
    with pytest.raises(ValueError, match="is_causal=True: the only balanced causal plan is the identity"):
        balanced(q, q, q, attn_mask=causal, is_causal=True)
    with pytest.raises(ValueError, match=r"attn_mask .*identity"):
        balanced(q, q, q, attn_mask=causal)
    with pytest.raises(ValueError, match="is_causal=True is a hint"):
        balanced(q, q, q, is_causal=True)
    for options in ({"dustbin": True}, {"relaxation": 1.0}):
        module = SinkhornMultiheadAttention(E, H, dtype=D, batch_first=True, **options)
        weights = module(q, q, q, attn_mask=causal, is_causal=True)[1]
        assert (weights.triu(1) == 0).all() and torch.isfinite(weights).all()
    ours, theirs = pair(batch_first=True)
    found, truth = (m(q, q, q, attn_mask=causal, is_causal=True)[0] for m in (ours, theirs))
    assert torch.allclose(found, truth, atol=1e-13)


def test_dropout_only_in_training() -> None:
    module = SinkhornMultiheadAttention(E, H, dropout=0.5, dtype=D, batch_first=True)
    q, k, v = inputs(batch_first=True)
    for need_weights in (True, False):
        module.train()
        assert not torch.equal(module(q, k, v, need_weights=need_weights)[0], module(q, k, v)[0])
        module.eval()
        assert torch.allclose(module(q, k, v, need_weights=need_weights)[0], module(q, k, v)[0], atol=1e-13)


def test_dustbin_parameters_learn_and_copies_work() -> None:
    module = SinkhornMultiheadAttention(E, H, dustbin=True, dtype=D, batch_first=True)
    assert module.dustbin_row_score.shape == module.dustbin_col_score.shape == (H, 1)
    q, k, v = inputs(batch_first=True)
    module(q, k, v)[0].sin().sum().backward()
    assert module.dustbin_row_score.grad.abs().min() > 0 and module.dustbin_col_score.grad.abs().min() > 0
    truth = module(q, k, v)[0]
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(q, k, v)[0], truth)
    assert SinkhornMultiheadAttention(E, H).dustbin_row_score is None


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "query must be a tensor, got list", {"query": [1.0]}),
        (ValueError, r"key has shape \(7, 12\)", {"key": torch.zeros(S, E, dtype=D)}),
        (ValueError, "value has 3 features; the module was built for 12", {"value": torch.zeros(N, S, 3, dtype=D)}),
        (
            ValueError,
            "query has batch size 2 but key has 3",
            {"key": torch.zeros(3, S, E, dtype=D), "value": torch.zeros(3, S, E, dtype=D)},
        ),
        (ValueError, r"attn_mask has shape \(7, 5\)", {"attn_mask": torch.zeros(S, L, dtype=torch.bool)}),
        (TypeError, "attn_mask must be a bool", {"attn_mask": torch.zeros(L, S, dtype=torch.int64)}),
        (ValueError, r"key_padding_mask has shape \(2, 5\)", {"key_padding_mask": torch.zeros(N, L, dtype=torch.bool)}),
        (TypeError, "query_padding_mask must be a bool", {"query_padding_mask": torch.zeros(N, L, dtype=D)}),
        (ValueError, "attn_mask holds NaN", {"key_padding_mask": torch.full((N, S), torch.nan, dtype=D)}),
    ],
)
def test_bad_inputs(error, message, change) -> None:
    module = SinkhornMultiheadAttention(E, H, dtype=D, batch_first=True)
    q, k, v = inputs(batch_first=True)
    with pytest.raises(error, match=message):
        module(**({"query": q, "key": k, "value": v} | change))
