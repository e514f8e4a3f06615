"""The TorchTPU engine with torch_tpu itself, on a machine without a TPU: what it registers, and what it would compile.

Each test is a process of its own: torch_tpu changes torch when its device is named, and libtpu is loaded once.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch_tpu") is None, reason="needs torch_tpu")
ROOT = Path(__file__).resolve().parents[3]

PRELUDE = """
import warnings
warnings.filterwarnings("ignore", message="<TorchTpu/")
import jax, jax.export, torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch_sinkhorn_attn import Dustbin, engines, sinkhorn_attention, sinkhorn_plan
from torch_sinkhorn_attn.problem.arguments import prepare
from torch_sinkhorn_attn.engines.binding import program as shared
from torch_sinkhorn_attn.engines.torchtpu import binding, mesh, program

def recorded(function, *given, mask=None, more=(), **options):
    q, k, v = (torch.randn(2, heads, 128, 64) for heads in (4, 2, 2))
    prepared = prepare(q, k, v, mask, enable_gqa=True, check_data=False, **options)
    statics = {"statics": shared.statics(prepared.problem), "lowering": binding.lowering(), **dict(more)}
    return program.record(function, [*shared.arrays(prepared.inputs, prepared.problem), *given], statics)

def duals():
    return {"output": torch.randn(2, 4, 128, 64), "grad_output": torch.randn(2, 4, 128, 64),
            "row_potentials": torch.zeros(3, 2, 4, 128), "col_potentials": torch.zeros(3, 2, 4, 128)}

def exported(op, *arguments):
    registered = op._init_fn
    args, kwargs = registered._normalize_invocation_args(arguments, {})
    args, kwargs = registered._get_jax_placeholders(args, kwargs)
    return registered.exported(*args, **kwargs)
"""


def run(program: str, *arguments: str, timeout: float = 240) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", PRELUDE + program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


def test_it_imports_without_a_tpu_and_its_variables_and_does_not_hang() -> None:
    said = run("import torch_tpu; print(engines.torchtpu.ENGINE.status()); print(binding.device_kind())", timeout=120)
    assert said.splitlines()[-2].startswith("torch_tpu 0.") and said.splitlines()[-1] == "TPU"


def test_the_ops_are_registered_and_their_fakes_take_symbolic_sizes() -> None:
    run("""
made, leaves = recorded("forward", more={"residuals": True}, window=(16, 16))
for function in ("solve", "forward", "backward"):
    schema = str(binding.op(function)._opoverload._schema)
    assert schema == f"torch_sinkhorn_attn::tpu_{function}(Tensor[] leaves, str program) -> Tensor[]", schema

def symbolic(op):
    graph = make_fx(lambda *x: op(list(x), made.text()), tracing_mode="symbolic")(*leaves).graph
    return next(node for node in graph.nodes if "tpu_" in str(node.target)).meta["val"]

shapes = [x.shape for x in symbolic(binding.op("forward"))]
assert any(isinstance(n, torch.SymInt) for n in shapes[0]), shapes
own = binding.jax_op("torch_sinkhorn_attn::with_their_fake", program.forward)
try:
    symbolic(own)
except RuntimeError as error:
    assert "Symbolic dimensions are not supported" in str(error)
else:
    raise AssertionError("torch_tpu's own fake kernel takes symbolic sizes now: ours may go")
theirs = own._abstract_fn(leaves, made.text())
ours = binding._fake(leaves, made.text())
assert [(x.shape, x.dtype) for x in theirs] == [(x.shape, x.dtype) for x in ours]
""")


def test_what_is_registered_exports_to_the_program_of_the_function() -> None:
    run("""
jax.config.update("jax_include_full_tracebacks_in_locations", False)

def text(written):
    with jax.interpreters.mlir.make_ir_context():
        module = jax.interpreters.mlir.ir.Module.parse(written.mlir_module())
        return str(module.operation.get_asm(enable_debug_info=False))

for function, given, more in (("forward", (), {"residuals": False}), ("backward", (duals(),), {"mask_grad": False})):
    made, leaves = recorded(function, *given, more=more, window=(16, 16))
    found = exported(binding.op(function), leaves, made.text())
    arrays = [jax.ShapeDtypeStruct(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in leaves]
    plain = jax.jit(getattr(program, function), static_argnums=1, keep_unused=True)
    with jax._src.config.export_ignore_forward_compatibility(True):
        expected = jax.export.export(plain, platforms=["tpu"])(arrays, made.text())
    assert found.platforms == ("tpu",) and "tpu_custom_call" in text(found) and text(found) == text(expected)
    assert [x.shape for x in found.out_avals] == [x.shape for x in binding._fake(leaves, made.text())]
""")


def test_fake_tensors_of_its_device_go_through_the_attention() -> None:
    run("""
import torch_tpu._loader as loader
loader._init_device("tpu")
with torch._subclasses.fake_tensor.FakeTensorMode(), torch.no_grad():
    q, k, v = (torch.empty(2, heads, 24, 8, device="tpu:0") for heads in (4, 2, 2))
    lengths = torch.empty(2, dtype=torch.int64, device="tpu:0")
    prepared = prepare(q, k, v, enable_gqa=True)
    assert engines.choose(None, prepared.inputs, prepared.problem) == "torchtpu"
    assert engines.engine_of(q.device).compiles
    options = {"key_lengths": lengths, "dustbin": Dustbin(0.1, 0.2), "dropout_p": 0.1, "enable_gqa": True}
    output, aux = sinkhorn_attention(q, k, v, torch.empty(24, 24, device="tpu:0"), return_aux=True, **options)
    assert output.shape == (2, 4, 24, 8) and output.device == q.device and aux.row_dustbin.shape == (2, 4, 24)
    assert sinkhorn_plan(q, k, enable_gqa=True).shape == (2, 4, 24, 24)
    prepared = prepare(q.double(), k.double(), v.double(), enable_gqa=True)
    refused = engines.torchtpu.ENGINE.refusal(prepared.inputs, prepared.problem)
    assert refused == "a TPU has no float64: use float32", refused
""")


@pytest.mark.parametrize("on", ["one device", "a mesh"])
@pytest.mark.parametrize("function", ["forward", "backward"])
def test_the_tpus_compiler_takes_what_is_registered(function: str, on: str, tmp_path: Path) -> None:
    """For a v6e; on a mesh, whose TPUs torch_tpu would have to ask, with an answer in its place."""
    run(
        """
import sys
function, on, path = sys.argv[1:]
more = {"residuals": False} if function == "forward" else {"mask_grad": on == "a mesh"}
given = () if function == "forward" else (duals(),)
if on == "a mesh":
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from types import SimpleNamespace as Answer
    from torch_tpu._internal.pallas import pallas
    dist.init_process_group("fake", rank=3, world_size=8, store=FakeStore())
    pallas._device_ops_backend = Answer(_get_local_device_attributes=lambda: {"device_kind": "TPU v6 lite"})
    pallas.device_mesh = Answer(get_device_assignment=lambda group: list(range(8)))
    mesh.set_sharding({"data": 4, "model": 2}, batch="data", heads="model")
    made, leaves = recorded(function, *given, mask=torch.randn(128, 128), more=more, dropout_p=0.1)
    made_on = mesh.sharded(made, {k: tuple(x.shape) for k, x in zip(made.names, leaves)}, mesh.placement())
    found = exported(binding.sharded_op(made_on), *made_on.grouped(leaves), made.text())
    assert found.nr_devices == 8
    place = list(made.results({k: tuple(x.shape) for k, x in zip(made.names, leaves)})).index(
        "output" if function == "forward" else "query"
    )
    assert found.out_avals[place].shape == (8, 8, 128, 64)
else:
    made, leaves = recorded(function, *given, more=more, window=(16, 16))
    found = exported(binding.op(function), leaves, made.text())
open(path, "wb").write(found.serialize())
""",
        function,
        on,
        str(tmp_path / "exported"),
    )
    from torch_sinkhorn_attn.aot.child import call

    axes = {"data": 4, "model": 2} if on == "a mesh" else None
    arguments = {"path": str(tmp_path / "exported"), "topology": "v6e:2x4", "mesh": axes}
    found = call("torch_sinkhorn_attn.aot.exported:compile_exported", arguments)
    assert found["kernels"] and found["memory"]["code"] > 0
    if on == "one device":
        assert f"sinkhorn_resident_{function}" in [kernel["name"] for kernel in found["kernels"]]
