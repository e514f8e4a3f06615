"""The TorchTPU engine on a stand-in for its library that computes on the CPU: values, gradients, fakes, modules; and
that what it would have compiled for a TPU is what torch_xla's would."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import problems
import pytest
import torch
from conformance import assert_agrees, relative_error, results
from marks import slow_after
from torch import Tensor

from torch_sinkhorn_attn import Dustbin, SinkhornMultiheadAttention, certify, engines, sinkhorn_attention
from torch_sinkhorn_attn.engines import torchtpu
from torch_sinkhorn_attn.engines.base import Engine
from torch_sinkhorn_attn.engines.binding.engine import absence
from torch_sinkhorn_attn.problem.arguments import prepare
from torch_sinkhorn_attn.problem.problem import Inputs, OutputGrads, Potentials, Problem

jax = pytest.importorskip("jax")

import torchtpu_standin as standin  # noqa: E402  it imports jax

from torch_sinkhorn_attn.engines.torchtpu import binding, program  # noqa: E402

D = torch.float64
needs_torch_xla = pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="needs torch_xla")


@pytest.fixture
def standing_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    registered = binding.op
    standin.install(monkeypatch)
    yield
    torchtpu.set_lowering()
    registered.cache_clear()


def randn(*shape: int, dtype: torch.dtype = D, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D).to(dtype)


def case(name: str, dtype: torch.dtype = D) -> problems.Call:
    ids = torch.tensor([[0] * 7 + [1] * 6, [0] * 4 + [3] * 7 + [-1] * 2])
    mask = randn(13, 13, dtype=dtype, seed=5).masked_fill(torch.eye(13) > 0, -torch.inf).requires_grad_()
    score = randn(4, 1, dtype=dtype, seed=6).requires_grad_()
    value = randn(4, 5, dtype=dtype, seed=7).requires_grad_()
    options: dict[str, Any] = {
        "window, unrolled": {"window": (5, 5), "gradient": "unrolled", "base_iters": 3},
        "lengths": {"query_lengths": torch.tensor([13, 6]), "key_lengths": torch.tensor([11, 8])},
        "segments": {"query_segment_ids": ids, "key_segment_ids": ids, "tolerance": 1e-2},
        "mask, dustbin, dropout": {"dustbin": Dustbin(score, 0.3, value=value), "dropout_p": 0.4},
        "implicit, relaxed": {"gradient": "implicit", "base_iters": 30, "relaxation": (2.0, None)},
        "softmax": {"base_iters": 0, "tail_iters": 0},
        "no queries": {},
        "no keys": {"dustbin": Dustbin(score, 0.1)},
        "no batch": {},
    }[name]
    num, length = 0 if name == "no batch" else 2, 0 if name == "no queries" else 13
    size = {"no keys": 0, "softmax": 11}.get(name, 13)
    shapes = [(num, 4, length, 6), (num, 2, size, 6), (num, 2, size, 5)]
    tensors = [randn(*shape, dtype=dtype, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    call = problems.Call(0, *tensors, options={**options, "enable_gqa": True}, leaves=list(tensors))
    if "dustbin" in options:
        call.leaves.append(score)
    if name.startswith("mask"):
        call.mask = mask
        call.leaves += [mask, value]
    return call


CASES = (
    "window, unrolled", "lengths", "segments", "mask, dustbin, dropout", "implicit, relaxed", "softmax", "no queries",
    "no keys", "no batch",
)  # fmt: skip


@pytest.mark.parametrize("name", slow_after(1, CASES, {"lengths", "softmax", "segments"}))
def test_it_agrees_with_the_reference(name: str, standing_in: None) -> None:
    assert_agrees(case(name), "torchtpu")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_random_problems_agree_with_the_reference(standing_in: None) -> None:
    for seed in range(7000, 7012):
        assert_agrees(problems.make(seed), "torchtpu", plan=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["window, unrolled", "mask, dustbin, dropout"])
def test_float32_is_as_exact_as_the_reference_in_float32(name: str, standing_in: None) -> None:
    found, plain, truth = (
        results(case(name, dtype), library, plan=False)
        for library, dtype in (("torchtpu", torch.float32), ("reference", torch.float32), ("reference", D))
    )
    for key, x in truth.items():
        if "residual" not in key:
            assert found[key].dtype == torch.float32
            allowed = 3 * relative_error(plain[key].double(), x) + 3e-6
            assert relative_error(found[key].double(), x) <= allowed, key


@pytest.mark.slow
@pytest.mark.exhaustive
def test_an_interpreted_kernel_agrees_with_the_reference(standing_in: None) -> None:
    torchtpu.set_lowering("auto", interpret=True)
    assert_agrees(case("window, unrolled"), "torchtpu", plan=False)


@pytest.mark.slow
def test_bfloat16_computes_in_float32(standing_in: None) -> None:
    half = [randn(1, 2, 12, 8, dtype=torch.bfloat16, seed=s).requires_grad_() for s in range(3)]
    out, aux = sinkhorn_attention(*half, window=(5, 5), return_aux=True, engine="torchtpu")
    truth = sinkhorn_attention(*(x.detach().double() for x in half), window=(5, 5), engine="reference")
    assert out.dtype == torch.bfloat16 and aux.row_potential.dtype == torch.float32
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(out.sum(), half))
    assert aux.row_residual.max() < 1e-4 and relative_error(out.double(), truth) < 1e-2


def test_it_is_the_engine_of_its_device(standing_in: None) -> None:
    x = randn(1, 2, 6, 4)
    prepared = prepare(x, x, x)
    assert engines.engine_of(x.device) is torchtpu.ENGINE and engines.engine_of(x.device).compiles
    assert torchtpu.ENGINE.refusal(prepared.inputs, prepared.problem) is None
    table, truth = (certify(x, x, engine=name) for name in ("torchtpu", "reference"))
    assert relative_error(table.bias_bound, truth.bias_bound) < 1e-8
    assert (table.status == truth.status).all()


def test_float64_is_refused_on_a_tpu(standing_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "platform", lambda: "tpu")
    x = randn(1, 2, 6, 4)
    with pytest.raises(ValueError, match="torchtpu: a TPU has no float64: use float32"):
        sinkhorn_attention(x, x, x, engine="torchtpu")


def test_a_kernel_needs_a_tpu_or_its_interpreter(standing_in: None) -> None:
    torchtpu.set_lowering("streaming")
    x = randn(1, 2, 6, 4)
    with pytest.raises(ValueError, match=r"shape='streaming' is a Pallas kernel for TPUs, and this device is cpu"):
        sinkhorn_attention(x, x, x, engine="torchtpu")


def test_without_it_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 4, 3)
    with pytest.raises(ValueError, match=r"torchtpu: it runs on TorchTPU's tensors, and query is on cpu: query.to"):
        sinkhorn_attention(x, x, x, engine="torchtpu")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch_tpu" else real(name))
    engine = torchtpu.ENGINE
    monkeypatch.setattr(engine, "missing", absence(engine.libraries, engine.remedy))
    assert engine.status().startswith("missing: torch_tpu is not installed: pip install 'torch_sinkhorn_attn[torcht")
    monkeypatch.setattr(engine, "device", "cpu")
    with pytest.raises(ValueError, match="torchtpu: torch_tpu is not installed"):
        sinkhorn_attention(x, x, x, engine="torchtpu")


@pytest.mark.slow
def test_a_module_and_data_that_vary_trace_once(standing_in: None) -> None:
    """Lengths are data: steps of training that differ in them compile nothing again."""
    torch.manual_seed(0)
    modules = [SinkhornMultiheadAttention(8, 2, batch_first=True, window=(6, 6), base_iters=4) for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    modules[0].engine = "torchtpu"
    counts = []
    for seed in range(3):
        x, pad = randn(2, 12, 8, dtype=torch.float32, seed=seed), torch.arange(12) >= torch.tensor([[12], [5 + seed]])
        for module in modules:
            module.zero_grad()
            module(x, x, x, key_padding_mask=pad, need_weights=False)[0].square().sum().backward()
        for found, truth in zip(*(m.parameters() for m in modules), strict=True):
            assert found.grad is not None and truth.grad is not None
            assert relative_error(found.grad, truth.grad) < 1e-4
        counts.append(len(standin.TRACED))
    assert counts[0] > 0 and counts == counts[:1] * 3


@pytest.mark.slow
def test_vmap_and_compile(standing_in: None) -> None:
    x = randn(3, 2, 2, 8, 4)
    mapped = torch.func.vmap(lambda x: sinkhorn_attention(x, x, x, base_iters=3, engine="torchtpu"))(x)
    expected = sinkhorn_attention(x, x, x, base_iters=3, engine="reference")
    assert relative_error(mapped, expected) < 1e-10

    def attend(x: Tensor) -> Tensor:
        return sinkhorn_attention(x, x, x, base_iters=3, engine="torchtpu")

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(recompile_limit=1):
        for length in (5, 7, 9):
            y, z = (randn(2, 2, length, 4).requires_grad_() for _ in range(2))
            compiled(y).square().sum().backward()
            sinkhorn_attention(z, z, z, base_iters=3, engine="reference").square().sum().backward()
            assert y.grad is not None and z.grad is not None and relative_error(y.grad, z.grad) < 1e-10


def recorded(call: problems.Call) -> list[tuple[str, program.Program, list[Tensor]]]:
    """The forward and the backward that a call makes: what runs, its program and its leaves."""
    found = []
    run = binding.op

    def watching(function: str) -> Any:
        def watched(leaves: list[Tensor], text: str) -> Any:
            found.append((function, program.parse(text), leaves))
            return run(function)(leaves, text)

        return watched

    binding.op = watching  # type: ignore[assignment]
    try:
        results(call, "torchtpu", plan=False)
    finally:
        binding.op = run
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mask, dustbin, dropout", "implicit, relaxed"])
def test_the_fakes_are_right(name: str, standing_in: None) -> None:
    """Names, shapes and dtypes as JAX finds them, and every check of torch.library, with symbolic sizes too."""
    calls = recorded(case(name, torch.float32))
    assert [function for function, *_ in calls] == ["forward", "backward"]
    for function, made, leaves in calls:
        assert program.parse(made.text()) == made
        shapes = {key: tuple(x.shape) for key, x in zip(made.names, leaves, strict=True)}
        arrays = [jax.ShapeDtypeStruct(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in leaves]
        truth = jax.eval_shape(made, arrays)
        assert made.results(shapes) == {key: x.shape for key, x in truth.items()}
        assert list(made.results(shapes)) == list(truth) and {str(x.dtype) for x in truth.values()} == {"float32"}
        plain = [x.detach().clone() for x in leaves]
        torch.library.opcheck(
            binding.op(function), (plain, made.text()),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )  # fmt: skip


class Caught(Exception):
    """What would have been lowered."""


def run_for_tpu(name: str, engine: Engine, inputs: Inputs, problem: Problem) -> None:
    if name == "forward":
        engine.forward(inputs, problem, residuals=False)
    elif name == "solve":
        engine.solve(inputs, problem)
    else:
        num, heads, length, _ = inputs.query.shape
        size, bins = inputs.key.shape[2], problem.num_dustbins
        zeros = inputs.query.new_zeros
        potentials = Potentials(zeros(3, num, heads, length + bins), zeros(3, num, heads, size + bins))
        assert inputs.value is not None
        output = zeros(num, heads, length, inputs.value.shape[-1])
        engine.backward(inputs, problem, output, potentials, OutputGrads(output, mask=inputs.mask is not None))


def exported(function: Any, arrays: list[Any], **statics: Any) -> str:
    """StableHLO for a TPU, without the names that Python's functions and arguments have."""
    import jax.export
    from jax.interpreters import mlir

    jitted = jax.jit(function, keep_unused=True, static_argnames=tuple(statics))
    text = jax.export.export(jitted, platforms=["tpu"])(*arrays, **statics).mlir_module()
    with mlir.make_ir_context():
        text = str(mlir.ir.Module.parse(text).operation.get_asm(enable_debug_info=False))
    return re.sub(r'jax\.(result|arg)_info = "[^"]*"|module @\w+', "", text)


@pytest.fixture
def without_stacks() -> Iterator[None]:
    """Kernels hold where their operations were written; the frames above differ, for it is other code that calls. What
    other tests traced was called from elsewhere still."""
    jax.clear_caches()
    name = "jax_include_full_tracebacks_in_locations"
    before = getattr(jax.config, name)
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)


@pytest.mark.slow
@needs_torch_xla
@pytest.mark.parametrize("name", slow_after(0, ["forward", "backward", "solve"], {"solve"}))
@pytest.mark.parametrize(
    "options", slow_after(0, ["window, kernel", "mask, dustbin, dropout"], {"mask, dustbin, dropout"})
)
def test_a_tpu_is_given_the_program_that_torch_xla_gives_it(
    name: str, options: str, standing_in: None, without_stacks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch_xla

    from torch_sinkhorn_attn.engines.xla import ENGINE as xla, binding as xla_binding

    def caught_xla(flat: Any, shapes: list[Any], platform: str) -> None:
        raise Caught(exported(flat, shapes))

    def caught_torchtpu(function: str) -> Any:
        def op(leaves: list[Tensor], text: str) -> None:
            arrays = [jax.ShapeDtypeStruct(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in leaves]
            raise Caught(exported(getattr(program, function), [arrays], program=text))

        return op

    for library in (xla_binding, binding):
        monkeypatch.setattr(library, "platform", lambda: "tpu")
        monkeypatch.setattr(library, "device_kind", lambda: "TPU v6e")
    monkeypatch.setattr(xla_binding, "_program", caught_xla)
    monkeypatch.setattr(binding, "op", caught_torchtpu)
    texts = []
    for engine, device in ((xla, torch_xla.device()), (torchtpu.ENGINE, torch.device("cpu"))):
        q, k, v = (randn(2, h, 128, 64, dtype=torch.float32, seed=h).to(device) for h in (4, 2, 2))
        more: dict[str, Any] = {"window": (16, 16)}
        mask = None
        if options.startswith("mask"):
            mask = randn(128, 128, dtype=torch.float32).to(device)
            more = {"dustbin": Dustbin(torch.zeros(4, 1, device=device), 0.3), "dropout_p": 0.4}
        prepared = prepare(q, k, v, mask, enable_gqa=True, check_data=False, **more)
        with pytest.raises(Caught) as error:
            run_for_tpu(name, engine, prepared.inputs, prepared.problem)
        texts.append(str(error.value))
    assert "tpu_custom_call" in texts[0] and texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_on_a_mesh_it_is_what_it_is_on_one_device() -> None:
    """Dropout too: each shard knows its place in the whole."""
    script = Path(__file__).with_name("shards.py")
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(script.parents[3]),
    }  # fmt: skip
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "agrees on 4 devices\n", done.stderr[-3000:]


def test_an_axis_of_a_mesh_has_one_use() -> None:
    from torch_sinkhorn_attn.engines.torchtpu import mesh

    with pytest.raises(ValueError, match=r"heads='x' is not an axis of the mesh; its axes are \['data', 'model'\]"):
        mesh.set_sharding({"data": 4, "model": 2}, batch="data", heads="x")
    with pytest.raises(ValueError, match="batch and heads both name 'data'; give each axis of the mesh one use"):
        mesh.set_sharding({"data": 4}, batch="data", heads="data")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("function", slow_after(0, ["backward", "forward"], {"backward", "forward"}))
def test_the_tpus_compiler_takes_it(function: str, standing_in: None, tmp_path: Path) -> None:
    """Exactly what is registered, exported as the library does, for a v6e."""
    from jax import export

    from torch_sinkhorn_attn.aot.child import call
    from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering

    found = {name: (made, leaves) for name, made, leaves in recorded(case("window, unrolled", torch.float32))}
    made, leaves = found[function]
    text = dataclasses.replace(made, lowering=Lowering("auto", generation="v6e")).text()
    arrays = [jax.ShapeDtypeStruct(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in leaves]
    jitted = jax.jit(getattr(program, function), static_argnames="program", keep_unused=True)
    written = export.export(jitted, platforms=["tpu"])(arrays, program=text).serialize()
    (tmp_path / "exported").write_bytes(written)
    arguments = {"path": str(tmp_path / "exported"), "topology": "v6e:2x4"}
    compiled = call("torch_sinkhorn_attn.aot.exported:compile_exported", arguments)
    assert [kernel["name"] for kernel in compiled["kernels"]] and compiled["memory"]["code"] > 0
