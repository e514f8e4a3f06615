"""SinkhornMultiheadAttention beside torch 2.9's nn.MultiheadAttention, item by item, as PARITY.md lists them.

Ideas from torch's own tests of the module (test_multihead_attention.py, test_native_mha.py, test_transformers.py),
written anew. Softmax mode (T = R = 0) must equal nn.MultiheadAttention; what does not depend on it runs by default.
"""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import SOFTMAX, D, E, H, L, N, S, pair, same, tokens
from torch import Tensor, nn

from torch_sinkhorn_attn import SinkhornMultiheadAttention

CONSTRUCTORS: list[dict[str, Any]] = [
    dict(zip(("bias", "add_bias_kv", "add_zero_attn", "kdim", "vdim"), values, strict=True))
    for values in itertools.product((True, False), (False, True), (False, True), (None, E, 5), (None, 4))
]


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


# Dropout


@pytest.mark.slow
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
    """And every test of parity its item."""
    folder = Path(__file__).parent
    table = (folder / "PARITY.md").read_text()
    named = {part for part in table.split("`") if part.startswith("test_") and not part.endswith(".py")}
    source = "".join(path.read_text() for path in folder.parent.rglob("test_*.py"))
    assert not [name for name in named if f"def {name}(" not in source]
    parity = "".join(path.read_text() for path in folder.glob("test_parity*.py"))
    here = set(re.findall(r"^def (test_\w+)", parity, flags=re.M)) - {"test_every_item_of_the_table_has_its_test"}
    assert len(here) > 30 and not here - named
