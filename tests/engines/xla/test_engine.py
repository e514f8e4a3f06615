"""The XLA engine on XLA:CPU: the results of the reference, in a graph without fallbacks that is compiled once."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conformance import relative_error
from marks import slow_after
from torch import Tensor

from torch_sinkhorn_attn import (
    Dustbin,
    SinkhornMultiheadAttention,
    certify,
    engines,
    set_checks,
    sinkhorn_attention,
    sinkhorn_cost,
    sinkhorn_matches,
    sinkhorn_plan,
    sinkhorn_plan_band,
)
from torch_sinkhorn_attn.boundary import ops
from torch_sinkhorn_attn.engines import xla
from torch_sinkhorn_attn.engines.binding.engine import absence
from torch_sinkhorn_attn.engines.tiled import tiles
from torch_sinkhorn_attn.problem.arguments import prepare

torch_xla = pytest.importorskip("torch_xla")
pytest.importorskip("jax")
torch_xla.device()  # autograd counts the devices at the first backward of a process, whatever test that is in

D = torch.float64


@pytest.fixture
def device() -> torch.device:
    return torch_xla.device()


@pytest.fixture
def fallbacks() -> Iterator[Any]:
    """A function that lists the operations which have left XLA for the CPU since the test began."""
    import torch_xla.debug.metrics as metrics

    metrics.clear_all()
    yield lambda: [name for name in metrics.counter_names() if name.startswith("aten::")]


def compilations() -> int:
    import torch_xla.debug.metrics as metrics

    found = metrics.metric_data("CompileTime")
    return found[0] if found else 0


def on(device: torch.device | str, x: Any) -> Any:
    """The tensors of a value there, leaves as leaves."""
    if isinstance(x, Tensor):
        return x.detach().to(device).requires_grad_(x.requires_grad)
    if isinstance(x, Dustbin):
        return Dustbin(**{name: on(device, value) for name, value in vars(x).items()})
    if isinstance(x, dict):
        return {name: on(device, value) for name, value in x.items()}
    return tuple(on(device, value) for value in x) if isinstance(x, tuple) else x


def fetched(*tensors: Tensor) -> list[Tensor]:
    """The tensors on the CPU, computed in one graph: one by one each would be compiled for itself."""
    import torch_xla

    torch_xla.sync()
    return [x.cpu() for x in tensors]


def randn(*shape: int, dtype: torch.dtype = D, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def options_of(name: str, dtype: torch.dtype) -> dict[str, Any]:
    ids = torch.tensor([[0] * 7 + [1] * 12, [0] * 4 + [3] * 13 + [-1] * 2])
    return {
        "plain": {},
        "window": {"window": (5, 5), "gradient": "unrolled", "base_iters": 3},
        "lengths": {"query_lengths": torch.tensor([19, 6]), "key_lengths": torch.tensor([17, 8])},
        "segments": {"query_segment_ids": ids, "key_segment_ids": ids, "tolerance": 1e-2, "acceleration": "chebyshev"},
        "dustbin": {
            "attn_mask": randn(19, 19, dtype=dtype, seed=5).masked_fill(torch.eye(19) > 0, -torch.inf).requires_grad_(),
            "dustbin": Dustbin(
                randn(4, 1, dtype=dtype, seed=6).requires_grad_(), 0.3, value=randn(4, 5, dtype=dtype, seed=7)
            ),
            "dropout_p": 0.4,
        },
        "implicit": {"gradient": "implicit", "base_iters": 40, "relaxation": (2.0, None), "over_relaxation": 1.3},
        "softmax": {"base_iters": 0, "tail_iters": 0},
    }[name]


def results(engine: str, device: torch.device | str, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, aux, and the gradients of a loss on all that is differentiable."""
    options = on(device, options_of(name, dtype))
    query, key, value = (
        on(device, randn(2, heads, n, width, dtype=dtype, seed=seed).requires_grad_())
        for seed, (heads, n, width) in enumerate([(4, 19, 6), (2, 19, 6), (2, 19, 5)])
    )
    output, aux = sinkhorn_attention(
        query, key, value, options.pop("attn_mask", None), enable_gqa=True, engine=engine, return_aux=True, **options
    )
    found = {"output": output} | {k: v for k, v in aux._asdict().items() if v is not None}
    loss = (output * on(device, randn(*output.shape, dtype=dtype, seed=9))).sum()
    if aux.row_dustbin is not None:
        loss = loss + aux.row_dustbin.square().sum() + aux.col_dustbin.sin().sum()
    leaves = {"query": query, "key": key, "value": value}
    if "dustbin" in options:
        leaves["row_score"] = options["dustbin"].row_score
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    found |= {f"gradient of {k}": g for k, g in zip(leaves, gradients, strict=True)}
    return {k: x.detach() for k, x in zip(found, fetched(*found.values()), strict=True)}


@pytest.fixture
def same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dropout of every device from the same two words; those of a device are from its own generator."""
    words = torch.tensor([123456789, 3987654321])
    monkeypatch.setattr(
        "torch_sinkhorn_attn.problem.arguments.dropout_seed", lambda p, device: words.to(device) if p else None
    )


CASES = ["plain", "window", "lengths", "segments", "dustbin", "implicit", "softmax"]


@pytest.mark.parametrize("name", slow_after(1, CASES))
def test_it_agrees_with_the_reference(name: str, device: torch.device, fallbacks: Any, same_seed: None) -> None:
    found = results("xla", device, name, D)
    assert not fallbacks()
    for key, x in results("reference", "cpu", name, D).items():
        assert relative_error(found[key], x, floor=1.0 if "residual" in key else 1e-3) < 1e-10, key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["window", "dustbin"])
def test_float32_is_as_exact_as_the_reference_in_float32(name: str, device: torch.device, same_seed: None) -> None:
    found, plain, truth = (
        results(engine, where, name, dtype)
        for engine, where, dtype in (
            ("xla", device, torch.float32), ("reference", "cpu", torch.float32), ("reference", "cpu", D)
        )
    )  # fmt: skip
    for key, x in truth.items():
        if "residual" not in key:
            allowed = (3 if "gradient" in key else 2) * relative_error(plain[key].double(), x) + 2e-6
            assert relative_error(found[key].double(), x) <= allowed, key


@pytest.mark.slow
def test_bfloat16_computes_in_float32(device: torch.device) -> None:
    half = [randn(1, 2, 24, 8, dtype=torch.bfloat16, seed=s).requires_grad_() for s in range(3)]
    there = [on(device, x) for x in half]
    out, aux = sinkhorn_attention(*there, window=(5, 5), return_aux=True)
    truth = sinkhorn_attention(*(x.detach().double() for x in half), window=(5, 5))
    assert out.dtype == torch.bfloat16 and aux.row_potential.dtype == torch.float32
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(out.sum(), there))
    output, residual = fetched(out.detach(), aux.row_residual)
    assert residual.max() < 1e-4 and relative_error(output.double(), truth) < 1e-2


def test_the_ops_give_the_shapes_and_types_of_their_fakes(device: torch.device) -> None:
    q, k, v = (on(device, randn(2, 2, 9, 4, seed=s)) for s in range(3))
    prepared = prepare(q, k, v, dustbin=Dustbin(0.1, 0.2))
    flat = ops.flatten(prepared.inputs, prepared.problem, "xla")
    forward, backward = torch.ops.torch_sinkhorn_attn.forward, torch.ops.torch_sinkhorn_attn.backward
    given = ops.with_residuals(flat, True)
    found, fakes = forward(*given), ops._forward_fake(*given)
    arguments = (torch.ones_like(found[0]), None, found[6], False, *found[:3], *flat)
    found, fakes = (*found, *backward(*arguments)), (*fakes, *ops._backward_fake(*arguments))
    assert [(x.shape, x.dtype, x.stride()) for x in found] == [(x.shape, x.dtype, x.stride()) for x in fakes]


@pytest.mark.slow
def test_plan_and_certificate(device: torch.device, fallbacks: Any) -> None:
    q, k = (randn(1, 2, 9, 4, seed=s).requires_grad_() for s in range(2))
    there = on(device, (q, k))
    plan, truth = sinkhorn_plan(*there, window=(4, 4)), sinkhorn_plan(q, k, window=(4, 4))
    gradient, expected = (torch.autograd.grad(x.square().sum(), y)[0] for x, y in ((plan, there[0]), (truth, q)))
    plan, gradient = fetched(plan.detach(), gradient)
    assert relative_error(plan, truth) < 1e-10 and relative_error(gradient, expected) < 1e-10
    assert not fallbacks()
    found, expected = (certify(*(x.detach() for x in pair)) for pair in (there, (q, k)))
    for x, y in zip(vars(found).values(), vars(expected).values(), strict=True):
        assert torch.allclose(x, y) if isinstance(y, Tensor) else x == y


@pytest.mark.slow
def test_matches(device: torch.device, fallbacks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several tiles, with ties that go to the lowest index there too."""
    monkeypatch.setattr(tiles, "block_size", lambda heads, reach=None: 8)
    q, k = randn(2, 9, 4), randn(2, 12, 4, seed=1)
    k[0, 5] = k[0, 2]
    for count, options in ((1, {"window": (9, 9)}), (2, {"dustbin": Dustbin(0.1, 0.2)})):
        expected = sinkhorn_matches(q, k, k=count, **options)
        found = sinkhorn_matches(*on(device, (q, k)), k=count, **options)
        present = [(x, y) for x, y in zip(found, expected, strict=True) if y is not None]
        for x, y in zip(fetched(*(x for x, _ in present)), (y for _, y in present), strict=True):
            assert torch.equal(x, y) if y.dtype == torch.int64 else torch.allclose(x, y, atol=1e-12)
    assert not fallbacks()


@pytest.mark.slow
@pytest.mark.parametrize("log", [False, True])
def test_a_band_and_its_gradient(log: bool, device: torch.device, fallbacks: Any) -> None:
    q, k = (randn(2, 1, 9, 4, seed=s).requires_grad_() for s in range(2))
    lengths = torch.tensor([9, 5])
    found = []
    for tensors, given in (((q, k), lengths), (on(device, (q, k)), on(device, lengths))):
        options = {"window": (2, 2), "query_lengths": given, "key_lengths": given, "dustbin": Dustbin(0.1, 0.2)}
        band = sinkhorn_plan_band(*tensors, log=log, **options)
        loss = band.values.masked_fill(band.values == -torch.inf, 0.0).square().sum() + band.col_dustbin[0].sum()
        found.append([band.values.detach(), band.first_column, *torch.autograd.grad(loss, tensors)])
    for x, y in zip(fetched(*found[1]), found[0], strict=True):
        assert torch.allclose(x, y, atol=1e-10)
    assert not fallbacks()


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["envelope", "tail"])
def test_the_cost_and_its_gradient(gradient: str, device: torch.device, fallbacks: Any) -> None:
    q, k = (randn(2, 2, 9, 4, seed=s).requires_grad_() for s in range(2))
    found = []
    for tensors in ((q, k), on(device, (q, k))):
        cost = sinkhorn_cost(*tensors, epsilon=0.7, relaxation=(None, 1.5), gradient=gradient)
        found.append([*(x.detach() for x in cost), *torch.autograd.grad(cost.primal.sum(), tensors)])
    for x, y in zip(fetched(*found[1]), found[0], strict=True):
        assert torch.allclose(x, y, atol=1e-10)
    assert not fallbacks()


@pytest.mark.slow
def test_training_compiles_once_whatever_the_lengths(device: torch.device, fallbacks: Any) -> None:
    import torch_xla

    def step(module: torch.nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, pad: Tensor) -> Tensor:
        output = module(x, x, x, key_padding_mask=pad, need_weights=False)[0]
        loss = output.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch_xla.sync()
        return loss.detach()

    torch.manual_seed(0)
    here = SinkhornMultiheadAttention(8, 2, batch_first=True, window=(6, 6), base_iters=5)
    there = SinkhornMultiheadAttention(8, 2, batch_first=True, window=(6, 6), base_iters=5)
    there.load_state_dict(here.state_dict())
    there.to(device)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5, momentum=0.9) for m in (here, there)]
    counts = []
    for seed in range(6):
        x = randn(3, 20, 8, dtype=torch.float32, seed=seed)
        pad = torch.arange(20) >= torch.tensor([[20], [7 + seed], [3 * seed + 1]])
        expected = step(here, optimizers[0], x, pad)
        found = step(there, optimizers[1], x.to(device), pad.to(device))
        assert not fallbacks()
        assert torch.allclose(found.cpu(), expected, rtol=1e-4)
        counts.append(compilations())
    assert counts[2:] == counts[2:3] * 4  # the momentum of the first step is not yet there


@pytest.mark.slow
def test_segments_and_masses_are_data(device: torch.device) -> None:
    import torch_xla

    counts = []
    for seed in range(4):
        q = on(device, randn(1, 2, 20, 4, dtype=torch.float32))
        ids = (torch.arange(20) // (3 + seed))[None].to(device)
        mass = torch.rand(20, generator=torch.Generator().manual_seed(seed)).to(device) + 0.5
        sinkhorn_attention(q, q, q, query_segment_ids=ids, key_segment_ids=ids, row_mass=mass)
        output = sinkhorn_attention(q, q, q, query_segment_ids=ids, key_segment_ids=ids, row_mass=mass)
        torch_xla.sync()
        assert torch.isfinite(output.cpu()).all()
        counts.append(compilations())
    assert counts[1:] == counts[:1] * 3


def test_a_call_synchronises_nothing(device: torch.device) -> None:
    import torch_xla.debug.metrics as metrics

    q = on(device, randn(1, 2, 12, 4, dtype=torch.float32)).requires_grad_()
    metrics.clear_all()
    lengths = torch.tensor([7]).to(device)
    output = sinkhorn_attention(q, q, q, query_lengths=lengths, key_lengths=lengths, dropout_p=0.1)
    torch.autograd.grad(output.sum(), q)
    assert not {"ExecuteTime", "CompileTime", "TransferFromDeviceTime"} & set(metrics.metric_names())


@pytest.mark.slow
def test_checks_that_look_at_masks(device: torch.device) -> None:
    """Always: also there, where a reduction of everything is not what it is elsewhere."""
    set_checks("always")
    q, mask = torch.randn(2, 2, 9, 4), torch.randn(9, 9)
    mask[:, 4] = -1e4
    for given, options in ((mask, {}), (mask, {"window": (4, 4)}), (mask[:1], {}), (mask[:, :1], {})):
        there = sinkhorn_attention(q.to(device), q.to(device), q.to(device), given.to(device), **options)
        torch.testing.assert_close(there.cpu(), sinkhorn_attention(q, q, q, given, **options), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="attn_mask holds NaN"):
        sinkhorn_attention(q.to(device), q.to(device), q.to(device), (mask * torch.nan).to(device))


@pytest.mark.slow
def test_views_inside_the_other_engines_are_views(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiled one writes into slices of its results, tile by tile."""
    monkeypatch.setattr("torch_sinkhorn_attn.engines.tiled.tiles.block_size", lambda heads, reach=None: 4)
    q, k, v = (randn(1, 1, 7, 3, seed=s) for s in range(3))
    options: dict[str, Any] = {"base_iters": 1, "tail_iters": 1, "engine": "tiled"}
    there = sinkhorn_attention(*on(device, (q, k, v)), **options)
    assert relative_error(there.cpu(), sinkhorn_attention(q, k, v, **options)) < 1e-12


def test_vmap(device: torch.device) -> None:
    q, k, v = (randn(3, 2, 2, 8, 4, seed=s) for s in range(3))
    expected = sinkhorn_attention(q, k, v, base_iters=3)
    there = on(device, (q, k, v))
    found = torch.func.vmap(lambda *x: sinkhorn_attention(*x, base_iters=3))(*there)
    assert relative_error(found.cpu(), expected) < 1e-10


@pytest.mark.slow
def test_torch_compile(device: torch.device) -> None:
    torch.manual_seed(0)
    here = SinkhornMultiheadAttention(8, 2, batch_first=True, window=(6, 6), base_iters=3)
    there = SinkhornMultiheadAttention(8, 2, batch_first=True, window=(6, 6), base_iters=3)
    there.load_state_dict(here.state_dict())
    there.to(device)
    compiled = torch.compile(there, backend="openxla")
    for seed in range(3):
        x, pad = randn(2, 12, 8, dtype=torch.float32, seed=seed), torch.arange(12) >= torch.tensor([[12], [5 + seed]])
        output = here(x, x, x, key_padding_mask=pad, need_weights=False)[0]
        found = compiled(*[x.to(device)] * 3, key_padding_mask=pad.to(device), need_weights=False)[0]
        for module, y in ((here, output), (there, found)):
            module.zero_grad()
            y.square().sum().backward()
        found, *gradients = fetched(found, *(x.grad for x in there.parameters()))
        assert relative_error(found, output) < 2e-6
        for mine, its in zip(here.parameters(), gradients, strict=True):
            assert mine.grad is not None and relative_error(its, mine.grad) < 1e-5


def test_each_engine_keeps_to_its_device(device: torch.device) -> None:
    x = torch.randn(1, 4, 3)
    with pytest.raises(ValueError, match=r"xla: it runs on XLA tensors, and query is on cpu: query.to\(torch_xla"):
        sinkhorn_attention(x, x, x, engine="xla")
    there = x.to(device)
    with pytest.raises(ValueError, match="cpu: it runs on CPU tensors, and query is on xla"):
        sinkhorn_attention(there, there, there, engine="cpu")
    prepared = prepare(there, there, there)
    assert engines.choose(None, prepared.inputs, prepared.problem) == "xla"


def test_without_jax_it_says_what_to_install(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jax" else real(name))
    monkeypatch.setattr(xla.ENGINE, "missing", absence(xla.ENGINE.libraries, xla.ENGINE.remedy))
    x = torch.randn(1, 4, 3).to(device)
    with pytest.raises(ValueError, match=r"xla: jax is not installed: pip install 'torch_sinkhorn_attn\[tpu\]'"):
        sinkhorn_attention(x, x, x, engine="xla")
    assert xla.ENGINE.status().startswith("missing: jax is not installed")
    prepared = prepare(x, x, x)
    assert engines.choose(None, prepared.inputs, prepared.problem) == "tiled"


@pytest.fixture
def asked() -> Iterator[None]:
    yield
    xla.set_lowering()


def test_the_kernels_are_the_users_choice(device: torch.device, asked: None) -> None:
    from torch_sinkhorn_attn.engines.xla import sharded

    assert sharded.lowering().shape == "blockwise"
    xla.set_lowering("streaming", interpret=True)
    assert (sharded.lowering().shape, sharded.lowering().interpret) == ("streaming", True)
    xla.set_lowering("streaming")
    x = torch.randn(1, 4, 3).to(device)
    with pytest.raises(
        ValueError, match=r"shape='streaming' is a Pallas kernel .* set_lowering\('streaming', interpret"
    ):
        sinkhorn_attention(x, x, x)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "options"), [("auto", "window")])
def test_an_interpreted_kernel_agrees_with_the_reference(
    shape: str, options: str, device: torch.device, asked: None
) -> None:
    xla.set_lowering(shape, interpret=True)
    found = results("xla", device, options, D)
    for key, x in results("reference", "cpu", options, D).items():
        assert relative_error(found[key], x, floor=1.0 if "residual" in key else 1e-3) < 1e-10, key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": "dense"}, "shape='dense' is unknown; choose one of 'auto', 'resident', 'wavefront', 'streaming'"),
        ({"base_dtype": "int8"}, "base_dtype='int8' is unknown; choose one of 'float32', 'bfloat16'"),
        ({"interpret": True}, "interpret=True runs a Pallas kernel by its interpreter, and shape=None names none"),
    ],
)
def test_a_wrong_choice_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        xla.set_lowering(**arguments)


@pytest.mark.slow
def test_the_environment_chooses_too() -> None:
    program = "from torch_sinkhorn_attn.engines import xla; print(xla.lowering())"

    def said(value: str) -> str:
        environment = os.environ | {"TORCH_SINKHORN_ATTN_XLA_LOWERING": value}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        return done.stdout + done.stderr

    assert "shape='resident', interpret=True, base_dtype='bfloat16'" in said("resident, interpret, bfloat16")
    assert "TORCH_SINKHORN_ATTN_XLA_LOWERING='fast' must be words separated by commas" in said("fast")


@pytest.mark.slow
def test_a_kernel_for_a_tpu_is_in_the_graph_that_is_lowered_for_one(device: torch.device) -> None:
    """In the version of its payload that the pinned libtpu reads: those of `jax.export` are."""
    import jax

    from torch_sinkhorn_attn.engines.binding import functions, program
    from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
    from torch_sinkhorn_attn.engines.xla import binding

    q = on(device, randn(1, 1, 128, 64, dtype=torch.float32))
    prepared = prepare(q, q, q, window=(16, 16))
    trees = program.arrays(prepared.inputs, prepared.problem)
    found = program.statics(prepared.problem)
    statics = {"statics": found, "lowering": Lowering("streaming"), "residuals": False}
    leaves, structure = jax.tree.flatten(trees)

    def flat(*x: Any) -> Any:
        return functions.forward(*jax.tree.unflatten(structure, x), **statics)

    shapes = [jax.ShapeDtypeStruct(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in leaves]
    lowered, _ = binding._program(flat, shapes, "tpu")
    assert "tpu_custom_call" in lowered.compiler_ir("hlo").as_hlo_text()


@pytest.mark.slow
def test_the_variable_is_named_when_it_is_wrong() -> None:
    wrong = {"TORCH_SINKHORN_ATTN_XLA_LOWERING": "interpret"}
    command = [sys.executable, "-c", "import torch, torch_sinkhorn_attn"]
    done = subprocess.run(command, env={**os.environ, **wrong}, capture_output=True, text=True)
    assert done.returncode and "TORCH_SINKHORN_ATTN_XLA_LOWERING='interpret': interpret=True" in done.stderr
