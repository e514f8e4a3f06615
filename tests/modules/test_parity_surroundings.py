"""What torch grants its own attention by namespace, by class or by being its own: tracers, exporters, files."""

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from torch_sinkhorn_attn import (
    Dustbin,
    SinkhornMultiheadAttention,
    certify,
    replace_attention,
    sinkhorn_attention,
    sinkhorn_plan,
)
from torch_sinkhorn_attn.modules import DUSTBIN_PARAMETERS, ModuleOptions

E, H = 12, 3


class Block(nn.Module):
    """Attention to the tokens and to constants, between other modules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(E, H, batch_first=True)
        self.out = nn.Linear(E, 2)
        self.register_buffer("constant", torch.randn(2, 5, E))

    def forward(self, x: Tensor, ignore=None):
        other = self.attention(self.constant, self.constant, self.constant)[0]
        y, weights = self.attention(x, x, x, key_padding_mask=ignore, average_attn_weights=False)
        return self.out(x + y + other), weights


class Paths(fx.Tracer):
    """Takes note of the module that each node comes from, as torchvision's feature extraction does."""

    def __init__(self) -> None:
        super().__init__()
        self.current, self.paths = "", {}

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        before, self.current = self.current, self.path_of_module(m)
        try:
            if self.is_leaf_module(m, self.current):
                return self.create_proxy("call_module", self.current, args, kwargs)
            return forward(*args, **kwargs)
        finally:
            self.current = before

    def create_proxy(self, *args: Any, **kwargs: Any) -> Any:
        proxy = super().create_proxy(*args, **kwargs)
        self.paths[proxy.node] = self.current
        return proxy


def kinds(graph: fx.Graph) -> list[tuple[str, str]]:
    """Operations and targets, without reads of attributes."""
    return [(node.op, str(node.target)) for node in graph.nodes if node.op != "get_attr"]


def no_proxy(module: nn.Module, args: Any) -> None:
    """A hook: those of a leaf do not run while it is traced."""
    assert not any(isinstance(x, fx.Proxy) for x in args)


def swapped(**options: Any) -> Block:
    model = Block().eval()
    replace_attention(model, **options)
    return model


@pytest.mark.parametrize("options", [{}, {"dustbin": True, "window": (3, 3)}], ids=str)
def test_fx_records_one_node_per_call(options: dict[str, Any]) -> None:
    """Graphs as before the swap, from any tracer, with hooks and compilation in place; they run and survive."""
    model, x = swapped(**options), torch.randn(2, 5, E)
    model.attention.register_forward_pre_hook(no_proxy)
    truth = model(x)
    traced = fx.symbolic_trace(model)
    assert kinds(traced.graph) == kinds(fx.symbolic_trace(Block()).graph)
    paths = Paths()
    graph = paths.trace(model)
    assert kinds(graph) == kinds(traced.graph)
    assert [paths.paths[node] for node in graph.nodes if node.op == "call_module"] == ["attention"] * 2 + ["out"]
    copies = [copy.deepcopy(traced), pickle.loads(pickle.dumps(traced)), fx.Transformer(traced).transform()]
    for module in (traced, fx.GraphModule(model, graph), fx.symbolic_trace(traced), *copies):
        assert all(torch.equal(a, b) for a, b in zip(module(x), truth, strict=True))
    found = fx.Interpreter(traced).run(x, None)
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))
    model.attention.compile(backend="eager")
    assert kinds(fx.symbolic_trace(model).graph) == kinds(traced.graph)


def test_fx_does_not_trace_into_the_module() -> None:
    """Nor into torch's: as the root of a trace, or by its forward."""
    for module in (nn.MultiheadAttention(E, H), SinkhornMultiheadAttention(E, H)):
        with pytest.raises((TypeError, fx.proxy.TraceError), match=r"records .* as one node|control flow"):
            fx.symbolic_trace(module)


class Functions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Parameter(torch.zeros(H, 1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bins = Dustbin(self.score, 0.1)
        out, aux = sinkhorn_attention(q, k, v, scale=q.shape[-1] ** -0.5, dustbin=bins, return_aux=True)
        return out.sum() + aux.row_dustbin.sum() + sinkhorn_plan(q, k).sin().sum() + certify(q, k).rate.sum()


def test_fx_records_the_functions_as_one_node_each() -> None:
    model = Functions()
    q, k, v = (torch.randn(2, H, n, 4) for n in (5, 7, 7))
    traced = fx.symbolic_trace(model)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert {sinkhorn_attention, sinkhorn_plan, certify, Dustbin} <= set(called)
    for module in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced)), fx.symbolic_trace(traced)):
        found = module(q, k, v)
        assert torch.equal(found, model(q, k, v))
        assert found.requires_grad
    with pytest.raises(TypeError, match="must be a number or a tensor"):
        Dustbin("0.1", 0.1)  # type: ignore[arg-type]


def test_fx_quantisation_leaves_the_attention_in_float() -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model, x = swapped(), torch.randn(2, 5, E)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (x,))
        prepared(x)
        found = convert_fx(prepared)
    assert type(found.attention) is SinkhornMultiheadAttention
    assert "quantized" in type(found.out).__module__
    assert torch.allclose(found(x)[0], model(x)[0], atol=0.1)


@pytest.mark.parametrize("masked", [False, True])
def test_jit_trace_saves_and_serves_other_sizes(masked: bool) -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = SinkhornMultiheadAttention(E, H, batch_first=True, window=(3, 3), dustbin=True)

        def forward(self, x: Tensor, ignore: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
            return self.attention(x, x, x, ignore, False, mask)[0]

    def inputs(num: int, length: int) -> tuple[Tensor, ...]:
        x = torch.randn(num, length, E)
        return (x, padding(num, length), torch.randn(length, length)) if masked else (x,)

    model = Alone().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python values, as torch's own module draws
        traced = torch.jit.trace(model, inputs(2, 5))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for given in (inputs(2, 5), inputs(3, 9)):
        given[0].requires_grad_()
        truth = model(*given)
        assert torch.allclose(loaded(*given), truth, atol=1e-6)
        grads = [torch.autograd.grad(f(*given).sin().sum(), given[0])[0] for f in (loaded, model)]
        assert torch.allclose(*grads, atol=1e-5)


# ONNX


class Attend(nn.Module):
    """A call with options that have no default in common."""

    def __init__(self, **options):
        super().__init__()
        self.attention = SinkhornMultiheadAttention(E, H, batch_first=True, base_iters=2, tail_iters=1, **options)

    def forward(self, x, ignore=None, mask=None):
        return self.attention(x, x, x, key_padding_mask=ignore, attn_mask=mask)


class Call(nn.Module):
    def forward(self, q, k):
        return sinkhorn_attention(q, k, k, is_causal=True, enable_gqa=True, relaxation=1.0, base_iters=2, tail_iters=1)


def onnx_results(program, *given):
    """What ONNX Runtime makes of the program and inputs."""
    import onnxruntime

    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    named = {place.name: x.numpy() for place, x in zip(session.get_inputs(), given, strict=True)}
    return [torch.from_numpy(x) for x in session.run(None, named)]


def padding(num: int, length: int) -> Tensor:
    return torch.arange(length) >= torch.arange(length, length - num, -1)[:, None]


def onnx_export(model, given, **options):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the exporter does not like of itself
        return torch.onnx.export(model, given, dynamo=True, verbose=False, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [pytest.param({"window": (2, 2)}, marks=pytest.mark.exhaustive), {"dustbin": True, "add_zero_attn": True}],
    ids=str,
)
def test_onnx_computes_the_module_at_other_sizes(options: dict[str, Any]) -> None:
    model = Attend(**options).eval()
    sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("length", min=2, max=512)}
    program = onnx_export(model, (torch.randn(2, 5, E), padding(2, 5)), dynamic_shapes=(sizes, sizes))
    for num, length in ((2, 5), (3, 9)):
        x, ignore = torch.randn(num, length, E), padding(num, length)
        with torch.no_grad():
            truth = model(x, ignore)
        for found, true in zip(onnx_results(program, x, ignore), truth, strict=True):
            assert torch.allclose(found, true, atol=1e-5)


@pytest.mark.slow
def test_onnx_computes_masks_functions_and_softmax_mode() -> None:
    x, mask = torch.randn(2, 5, E), torch.randn(5, 5).masked_fill(torch.eye(5).bool(), -torch.inf)
    masked = Attend(tolerance=0.1, over_relaxation=1.2, relaxation=1.0, gradient="implicit").eval()
    q, k = torch.randn(1, 4, 6, 4), torch.randn(1, 2, 5, 4)
    for model, given in ((masked, (x, None, mask)), (Call(), (q, k))):
        with torch.no_grad():
            truth = model(*given)
        found = onnx_results(onnx_export(model, given), *(x for x in given if x is not None))
        for a, b in zip(found, truth if isinstance(truth, tuple) else (truth,), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_onnx_refuses_our_operators_with_advice() -> None:
    model, x = Attend().eval(), torch.randn(2, 5, E)
    program = torch.export.export(model, (x,))
    named = Attend(engine="tiled").eval()
    for given in ((program, ()), (named, (x,))):
        with pytest.raises(Exception) as caught:
            onnx_export(*given)
        reasons, error = "", caught.value
        while error is not None:
            reasons, error = reasons + str(error), error.__cause__
        assert "Hand the module to torch.onnx.export, with engine=None or 'reference'" in reasons


# Files


@pytest.mark.parametrize("built", [True, False], ids=["built", "swapped"])
def test_modules_pickled_before_an_option_existed(built: bool) -> None:
    """Any option's attribute may be missing, and the dustbin's parameters: defaults take their place."""
    module = SinkhornMultiheadAttention(E, H, batch_first=True) if built else swapped().attention
    x = torch.randn(2, 5, E)
    truth = module(x, x, x)[0]
    names = [name for name in ModuleOptions._fields if name != "dustbin"]
    for missing in ([], *([name] for name in (*names, *DUSTBIN_PARAMETERS)), [*names, *DUSTBIN_PARAMETERS]):
        state = copy.deepcopy(module.__dict__)
        state["_parameters"] = {k: p for k, p in state["_parameters"].items() if k not in missing}
        other = SinkhornMultiheadAttention.__new__(SinkhornMultiheadAttention)
        other.__setstate__({name: x for name, x in state.items() if name not in missing})
        assert torch.equal(other(x, x, x)[0], truth) and other.options == module.options
        assert set(module.__dict__) <= set(other.__dict__) and list(other.state_dict()) == list(module.state_dict())


def test_modules_pickled_by_a_newer_version(recwarn: pytest.WarningsRecorder) -> None:
    """Attributes unknown here are kept; if they are options, a warning names them."""
    module = SinkhornMultiheadAttention(E, H, batch_first=True)
    module.my_tag = 3  # type: ignore[assignment]
    other = pickle.loads(pickle.dumps(module))
    assert other.my_tag == 3 and not recwarn.list
    state = {**module.__getstate__(), "annealing": 0.5, "_sinkhorn_options": (*ModuleOptions._fields, "annealing")}
    other = SinkhornMultiheadAttention.__new__(SinkhornMultiheadAttention)
    with pytest.warns(UserWarning, match=r"newer version of torch_sinkhorn_attn, with annealing=0\.5"):
        other.__setstate__(state)
    x = torch.randn(1, 5, E)
    assert other.annealing == 0.5 and torch.equal(other(x, x, x)[0], module(x, x, x)[0])


def test_whole_modules_load_with_weights_only() -> None:
    """Once the classes are allowed, as nn.MultiheadAttention has to be."""
    classes = [SinkhornMultiheadAttention, NonDynamicallyQuantizableLinear]
    for module in (SinkhornMultiheadAttention(E, H, dustbin=True), swapped().attention):
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        with pytest.raises(pickle.UnpicklingError, match="Unsupported global"):
            torch.load(file)
        file.seek(0)
        with torch.serialization.safe_globals(classes):
            other = torch.load(file)
        x = torch.randn(2, 5, E)
        assert torch.equal(other(x, x, x)[0], module(x, x, x)[0])


def test_torch_package_takes_the_class_from_the_installed_package(tmp_path: Path) -> None:
    model, x = swapped().attention, torch.randn(2, 5, E)
    with torch.package.PackageExporter(tmp_path / "model.pt") as exporter:
        exporter.extern(["torch_sinkhorn_attn.**"])
        exporter.save_pickle("model", "model.pkl", model)
    other = torch.package.PackageImporter(tmp_path / "model.pt").load_pickle("model", "model.pkl")
    assert type(other) is SinkhornMultiheadAttention and torch.equal(other(x, x, x)[0], model(x, x, x)[0])


def test_wrapping_policies_by_class_find_it() -> None:
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy, size_based_auto_wrap_policy

    model = swapped()
    assert set(ModuleWrapPolicy({nn.MultiheadAttention})._run_policy(model, set(), {})) == {model.attention}
    given = {"module": model.attention, "recurse": True, "nonwrapped_numel": 10, "min_num_params": 1}
    assert not size_based_auto_wrap_policy(**given)  # its parts are not wrapped one by one
