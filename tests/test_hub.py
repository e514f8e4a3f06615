"""`hub/`: the package as a kernel of Hugging Face's `kernels`, laid out as its builder does and loaded as it does."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAME = "torch_sinkhorn_attn"
# What the builder's check looks at.
REGISTERING = {f"torch.library.{x}" for x in ("custom_op", "register_fake", "register_vmap", "register_kernel")}
# As the builder writes it, but for the backend, which it asks torch for.
OPS = """
import torch
_OPS_NAME = "{id}"
ops = getattr(torch.ops, _OPS_NAME)
def add_op_namespace_prefix(op_name: str) -> str:
    return f"{{_OPS_NAME}}::{{op_name}}"
"""
# As kernels.importer does; the installed package is not to be found.
LOAD = """
import importlib.util, json, sys, warnings
from pathlib import Path
sys.modules["torch_sinkhorn_attn"] = None
def load(variant):
    metadata = json.loads((variant / "metadata.json").read_text())
    spec = importlib.util.spec_from_file_location(metadata["id"], variant / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[metadata["id"]] = module
    spec.loader.exec_module(module)
    return module
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "project"
    subprocess.run([sys.executable, str(ROOT / "hub/assemble.py"), str(folder)], check=True, capture_output=True)
    return folder


def build(project: Path, folder: Path, unique: str, backend: str = "cpu") -> Path:
    """A build variant, in `folder`."""
    variant, identity = folder / f"torch-{backend}", f"_{NAME}_{backend}_{unique}"
    shutil.copytree(project / "torch-ext" / NAME, variant)
    (variant / "_ops.py").write_text(OPS.format(id=identity))
    metadata = {
        "id": identity, "name": NAME.replace("_", "-"), "version": 0, "license": "Apache-2.0",
        "python-depends": [], "backend": {"type": backend},
    }  # fmt: skip
    (variant / "metadata.json").write_text(json.dumps(metadata))
    return variant


def run(program: str, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", LOAD + program]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_project_is_what_the_builder_asks_for(project: Path) -> None:
    tomllib = pytest.importorskip("tomllib")
    with (project / "build.toml").open("rb") as file:
        general = tomllib.load(file)["general"]
    assert general["name"].replace("-", "_") == NAME and "tpu" in general["backends"]
    entry = project / "torch-ext" / NAME
    assert (entry / "__init__.py").exists() and not (entry / "_ops.py").exists() and not (entry / NAME).exists()
    assert (entry / "engines/tpu/resident/forward.py").exists()


def test_modules_import_one_another_relatively_and_ops_have_the_builds_namespace(project: Path) -> None:
    registered = 0
    for path in (project / "torch-ext" / NAME).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.partition(".")[0] == NAME for alias in node.names), path
            if isinstance(node, ast.ImportFrom):
                assert node.level or str(node.module).partition(".")[0] != NAME, path
            if isinstance(node, ast.Call) and ast.unparse(node.func) in REGISTERING:
                assert ast.unparse(node.args[0]).startswith("add_op_namespace_prefix("), path
                registered += 1
    assert registered >= 9


@pytest.mark.slow
def test_two_builds_in_one_process(project: Path, tmp_path: Path) -> None:
    """Values, gradients and compiled programs; neither the other build nor an installed package is touched."""
    for unique in ("a1", "b2"):
        build(project, tmp_path / unique, unique)
    program = """
import torch
from torch.nn.functional import scaled_dot_product_attention
q, k, v = torch.randn(3, 1, 2, 6, 4, generator=torch.Generator().manual_seed(0)).unbind()
q.requires_grad_()
kernels = [load(Path(unique, "torch-cpu")) for unique in ("a1", "b2")]
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for kernel in kernels:
        soft = kernel.sinkhorn_attention(q, k, v, base_iters=0, tail_iters=0)
        torch.testing.assert_close(soft, scaled_dot_product_attention(q, k, v))
        plan = kernel.sinkhorn_plan(q, k, base_iters=300, dustbin=None)
        torch.testing.assert_close(plan.sum(-2), torch.ones(1, 2, 6))
        assert hasattr(getattr(torch.ops, kernel.__name__), "forward"), kernel.__name__
    attend = torch.compile(kernels[0].sinkhorn_attention, backend="aot_eager", fullgraph=True)
    outputs = attend(q, k, v), kernels[1].sinkhorn_attention(q, k, v)
    gradients = [torch.autograd.grad(x.sin().sum(), q)[0] for x in outputs]
torch.testing.assert_close(*outputs)
torch.testing.assert_close(*gradients)
module = kernels[1].SinkhornMultiheadAttention(4, 2)
assert module(v[0], v[0], v[0])[0].shape == v[0].shape
assert kernels[0].Dustbin is not kernels[1].Dustbin
assert not hasattr(torch.ops.torch_sinkhorn_attn, "forward")
assert not [name for name in sys.modules if name.startswith("torch_sinkhorn_attn.")]
print({str(x.message).partition(" computes")[0] for x in said if x.filename == "<string>"})
"""
    assert run(program, tmp_path).strip() == """{"engine='tiled'"}"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs jax")
def test_the_jax_half_of_a_build_for_tpus(project: Path, tmp_path: Path) -> None:
    build(project, tmp_path, "c3", "tpu")
    program = """
sys.modules["torch"] = None
kernel = load(Path("torch-tpu"))
import jax
from importlib import import_module
tpu = import_module(kernel.__name__ + ".engines.tpu")
q, k, v = (jax.random.normal(jax.random.key(i), (2, 6, 4)) for i in range(3))
uniform = jax.nn.softmax(q @ k.swapaxes(-1, -2) / 2, -1) @ v
assert abs(tpu.sinkhorn_attention(q, k, v, base_iters=0, tail_iters=0) - uniform).max() < 1e-5
lowering = tpu.Lowering("streaming", interpret=True)
assert abs(tpu.sinkhorn_attention(q, k, v, lowering=lowering) - tpu.sinkhorn_attention(q, k, v)).max() < 1e-5
"""
    run(program, tmp_path)


def test_a_folder_of_something_else_is_left_alone(project: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    command = [sys.executable, str(ROOT / "hub/assemble.py")]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and "holds something else than a kernel's project" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    subprocess.run([*command, str(project)], check=True, capture_output=True)  # one of its own it writes again
