"""torch.compile, torch.export, torch.func on modules, and activation checkpointing."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conformance import ENGINES
from marks import slow_after
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from torch_sinkhorn_attn import (
    Dustbin,
    SinkhornMultiheadAttention,
    replace_attention,
    sinkhorn_attention,
)
from torch_sinkhorn_attn.problem.masks import scan as mask_scan
from torch_sinkhorn_attn.problem.support import build_support, token_ids

E, H = 16, 4


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def attention(**options: Any) -> SinkhornMultiheadAttention:
    torch.manual_seed(0)
    return SinkhornMultiheadAttention(E, H, batch_first=True, **options)


def encoder(**options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True), 2)
    replace_attention(model, **options)
    return model


def padding(*lengths: int, size: int = 8) -> Tensor:
    return torch.arange(size) >= torch.tensor(lengths)[:, None]


class Alone(nn.Module):
    """Self-attention as a module of one argument and a mask."""

    def __init__(self, module: SinkhornMultiheadAttention):
        super().__init__()
        self.attention = module

    def forward(self, x: Tensor, ignore: Tensor) -> Tensor:
        return self.attention(x, x, x, key_padding_mask=ignore, need_weights=False)[0]


# Compilation


@pytest.mark.parametrize(
    "options", slow_after(0, [{"window": (3, 3)}, {"dustbin": True}], [{"window": (3, 3)}]), ids=str
)
def test_one_compilation_serves_all_lengths_of_a_bucket(options: dict[str, Any]) -> None:
    """Padded to the bucket, with the true lengths as data: forward and backward."""
    module, counter = Alone(attention(**options)), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for n in range(3, 9):
            x = torch.randn(2, 8, E, requires_grad=True)
            found, truth = (f(x, padding(n, n - 1)) for f in (compiled, module))
            assert torch.allclose(found, truth, atol=1e-5)
            gradients = [torch.autograd.grad(y.sin().sum(), x)[0] for y in (found, truth)]
            assert torch.allclose(*gradients, atol=1e-5)
    assert counter.frame_count == 1


def test_one_compilation_serves_all_lengths_of_the_functional() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def function(x: Tensor, lengths: Tensor) -> Tensor:
        return sinkhorn_attention(x, x, x, query_lengths=lengths, key_lengths=lengths)

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for n in range(1, 9):
        x, lengths = torch.randn(2, H, 8, 4, requires_grad=True), torch.tensor([n - 1, n])
        assert torch.allclose(compiled(x, lengths), function(x, lengths), atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "options"),
    [
        pytest.param(False, {"window": (3, 3)}, marks=pytest.mark.exhaustive),
        (True, {"dustbin": Dustbin(0.1, 0.2)}),
    ],
)
def test_one_compilation_serves_dynamic_shapes(options: dict[str, Any], mask: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def function(x: Tensor, scores: Tensor | None) -> Tensor:
        return sinkhorn_attention(x, x, x, scores, **options)

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for n in (6, 7, 11, 23):
        x, scores = torch.randn(2, H, n, 4, requires_grad=True), torch.randn(n, n) if mask else None
        torch._dynamo.mark_dynamic(x, 2)
        if scores is not None:
            torch._dynamo.mark_dynamic(scores, (0, 1))
        found, truth = (f(x, scores) for f in (compiled, function))
        assert torch.allclose(found, truth, atol=1e-5)
        assert torch.allclose(*(torch.autograd.grad(y.sin().sum(), x)[0] for y in (found, truth)), atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.exhaustive
def test_everything_dynamic() -> None:
    """`dynamic=True` makes symbols of numbers too."""
    module, counter = Alone(attention()), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    frames = set()
    for n in (6, 9, 14):
        x = torch.randn(2, n, E)
        assert torch.allclose(compiled(x, padding(n, n - 2, size=n)), module(x, padding(n, n - 2, size=n)), atol=1e-5)
        frames.add(counter.frame_count)
    assert len(frames) == 1


def test_reading_a_mask_is_an_op_of_its_own_when_compiled() -> None:
    ids = token_ids(2, 6, torch.tensor([6, 4]), None, torch.device("cpu"))
    support = build_support(ids, ids, (2, 2), False)
    for mask in (torch.rand(1, 1, 6, 6) < 0.5, torch.randn(2, 3, 6, 6).masked_fill(torch.eye(6).bool(), -torch.inf)):
        arguments = (mask, *support, False, torch.float32, -1e3)
        torch.library.opcheck(torch.ops.torch_sinkhorn_attn.scan_mask.default, arguments)
        found, truth = mask_scan._scan_op(*arguments), mask_scan.scan_mask(mask, support, False, torch.float32)
        assert torch.equal(found[0], truth.row_active) and torch.equal(found[1], truth.col_active)


@pytest.mark.slow
def test_inductor_compiles_forward_and_backward() -> None:
    module = Alone(attention(dustbin=True))
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(2, 8, E, requires_grad=True)
    found, truth = (f(x, padding(8, 5)) for f in (compiled, module))
    assert torch.allclose(found, truth, atol=1e-5)
    weight = module.attention.in_proj_weight
    assert torch.allclose(*(torch.autograd.grad(y.sin().sum(), weight)[0] for y in (found, truth)), atol=1e-4)


# Export


@pytest.mark.slow
@pytest.mark.parametrize(("strict", "dustbin"), [(True, False), (False, True)])
def test_export_with_dynamic_batch_and_length(strict: bool, dustbin: bool) -> None:
    module = Alone(attention(dustbin=dustbin))
    sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("length", min=2, max=512)}
    given = (torch.randn(2, 8, E), padding(8, 5))
    program = torch.export.export(module, given, dynamic_shapes=(sizes, sizes), strict=strict)
    assert sum("torch_sinkhorn_attn.forward" in str(node.target) for node in program.graph.nodes) == 1
    x = torch.randn(3, 11, E, requires_grad=True)
    found, truth = (f(x, padding(11, 9, 7, size=11)) for f in (program.module(), module))
    assert torch.allclose(found, truth, atol=1e-6)
    assert torch.allclose(*(torch.autograd.grad(y.sin().sum(), x)[0] for y in (found, truth)), atol=1e-5)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_an_exported_encoder_survives_saving() -> None:
    model = encoder(window=(4, 4)).eval()
    x, ignore = torch.randn(2, 8, E), padding(8, 5)
    length = torch.export.Dim("length", min=2, max=512)
    with torch.no_grad():
        program = torch.export.export(
            model, (x,), {"src_key_padding_mask": ignore},
            dynamic_shapes={"src": {1: length}, "src_key_padding_mask": {1: length}},
        )  # fmt: skip
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.export.save(program, file)
            file.seek(0)
            loaded = torch.export.load(file).run_decompositions().module()
        x, ignore = torch.randn(2, 13, E), padding(13, 6, size=13)
        found, truth = (f(x, src_key_padding_mask=ignore) for f in (loaded, model))
    assert torch.allclose(found[~ignore], truth[~ignore], atol=1e-5)


# torch.func on modules


def test_functional_call_and_gradients_per_sample() -> None:
    module = Alone(attention(dustbin=True))
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    x, ignore = torch.randn(3, 8, E), padding(8, 5, 3)
    doubled = {name: 2 * p for name, p in parameters.items()}
    found = functional_call(module, doubled, (x, ignore))
    other = Alone(attention(dustbin=True))
    other.load_state_dict(doubled)
    assert torch.equal(found, other(x, ignore))

    def loss(parameters: dict[str, Tensor], x: Tensor, ignore: Tensor) -> Tensor:
        return functional_call(module, parameters, (x[None], ignore[None])).sin().sum()

    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, ignore)
    for i in range(3):
        module.zero_grad()
        module(x[i : i + 1], ignore[i : i + 1]).sin().sum().backward()
        for name, p in module.named_parameters():
            assert torch.allclose(each[name][i], p.grad, atol=1e-4)


def test_ensembles_of_modules() -> None:
    modules = [attention() for _ in range(3)]
    for i, module in enumerate(modules):
        nn.init.normal_(module.in_proj_weight, std=0.1 * (i + 1))
    parameters, buffers = stack_module_state(modules)
    base, x = attention().to("meta"), torch.randn(2, 8, E)
    found = vmap(lambda p, b: functional_call(base, (p, b), (x, x, x))[0], in_dims=(0, 0))(parameters, buffers)
    for i, module in enumerate(modules):
        assert torch.allclose(found[i], module(x, x, x)[0], atol=1e-5)


@pytest.mark.slow
def test_compiled_forward_mode_keeps_its_tangents() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 5, 4, generator=g, dtype=torch.float64) for _ in range(3))

    def slope(x: Tensor) -> Tensor:
        return jvp(lambda x: sinkhorn_attention(x, k, v).sin().sum(), (x,), (k,))[1]

    truth = slope(q)
    assert truth.abs() > 1e-2 and torch.allclose(torch.compile(slope, backend="eager")(q), truth, atol=1e-12)


def test_forward_mode_through_the_module() -> None:
    module, x = Alone(attention()), torch.randn(2, 8, E)
    for need in (padding(8, 5), padding(8, 8)):
        out, tangent = jvp(lambda x, m=need: module(x, m), (x,), (torch.ones_like(x),))
        leaf = x.clone().requires_grad_()
        weights = torch.randn_like(out)
        (truth,) = torch.autograd.grad((module(leaf, need) * weights).sum(), leaf)
        assert torch.allclose((tangent * weights).sum(), truth.sum(), rtol=1e-3, atol=1e-3)


# Activation checkpointing


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_checkpointed_self_attention_is_still_self_attention(reentrant: bool, need_weights: bool) -> None:
    """Reentrant checkpointing hands the recomputation three tensors for one; their memory is the same."""
    module = attention().double()
    ignore = padding(8, 5)
    results = []
    for kind in ("plain", "checkpointed"):
        x = torch.randn(2, 8, E, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        if kind == "plain":
            out = module(x, x, x, ignore, need_weights)[0]
        else:
            out = checkpoint(module, x, x, x, ignore, need_weights, use_reentrant=reentrant)[0]
        results.append((out, _backward(out, x)))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def _backward(out: Tensor, x: Tensor) -> Tensor:
    """The gradient of the leaf x, by `backward()`: reentrant checkpointing has no other way."""
    out.sin().sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers(reentrant: bool) -> None:
    model = encoder(dustbin=True)
    ignore = padding(8, 5)
    results = []
    for kind in ("plain", "checkpointed"):
        model.zero_grad()
        x = torch.randn(2, 8, E, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = x
        for layer in model.layers:
            if kind == "plain":
                out = layer(out, src_key_padding_mask=ignore)
            else:
                out = checkpoint(layer, out, None, ignore, use_reentrant=reentrant)
        out[~ignore].sin().sum().backward()
        results.append([x.grad, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_second_derivatives_inside_a_checkpoint() -> None:
    """Its recomputed tensors may be unpacked once."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 4, generator=g, dtype=torch.float64) for _ in range(3))
    results = []
    for engine in ("reference", *ENGINES):

        def force(q: Tensor, engine: str = engine) -> Tensor:
            out = sinkhorn_attention(q, k, v, engine=engine)
            return torch.autograd.grad(out.sin().sum(), q, create_graph=True)[0]

        leaf = q.clone().requires_grad_()
        checkpoint(force, leaf * 1.0, use_reentrant=False).square().sum().backward()
        results.append(leaf.grad)
    assert all(torch.allclose(results[0], x, atol=1e-12) for x in results[1:])


def test_dropout_is_the_same_when_recomputed() -> None:
    module = attention(dropout=0.5)
    results = []
    for reentrant in (None, True, False):
        torch.manual_seed(0)
        x = torch.randn(2, 8, E, generator=torch.Generator().manual_seed(0)).requires_grad_()
        call = (x, x, x, None, False)
        out = module(*call)[0] if reentrant is None else checkpoint(module, *call, use_reentrant=reentrant)[0]
        results.append(_backward(out, x))
    assert all(torch.allclose(results[0], g, atol=1e-6) for g in results[1:])
