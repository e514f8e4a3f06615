"""Importing the package: nothing before it is asked for, and all that an import has always given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import torch_sinkhorn_attn  # noqa: E402

ROOT = Path(__file__).parents[2]


def run(program: str, *arguments: str) -> None:
    """In a process of its own, where nothing has been imported."""
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("first", ["torch", "torch_sinkhorn_attn"])
def test_operators_are_there_beside_torch_in_either_order(first: str) -> None:
    run(
        """
import importlib, sys
first = sys.argv[1]
importlib.import_module(first)
assert first == "torch" or not {"torch", "numpy"} & set(sys.modules)
import torch, torch_sinkhorn_attn
assert not any(type(x).__module__.startswith("torch_sinkhorn_attn") for x in sys.meta_path)
assert torch.__spec__.loader is torch.__loader__ and torch.__loader__.name == "torch"
plans = ("plan", "plan_backward", "log_plan", "log_plan_backward", "matches", "band")
for name in ("forward", "backward", *plans, "scan_mask"):
    assert callable(getattr(torch.ops.torch_sinkhorn_attn, name))
assert "torch_sinkhorn_attn.integrations" not in sys.modules and "torch_sinkhorn_attn.modules" not in sys.modules
""",
        first,
    )


# Each is the first to import torch, and is needed whole by the operators.
MODULES = (
    "problem.looking", "engines.registry", "problem.masks.scan", "problem.problem", "problem.support",
    "problem.tensor_kinds", "boundary.autograd", "functional",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.exhaustive
def test_any_module_may_be_imported_first() -> None:
    program = """
import importlib, os, sys
for name in sys.argv[1:]:
    if os.fork() == 0:  # nothing is imported here yet
        try:
            importlib.import_module(name)
            import torch_sinkhorn_attn, torch
            assert torch_sinkhorn_attn.Dustbin and callable(torch.ops.torch_sinkhorn_attn.scan_mask), name
        except BaseException as error:
            sys.stderr.write(f"{name}: {error!r}\\n")
            os._exit(1)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(1)
"""
    run(program, *(f"torch_sinkhorn_attn.{name}" for name in MODULES))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["set_checks", "engines.ENGINES", "sinkhorn_attention"])
def test_a_name_that_brings_torch_brings_the_operators(name: str) -> None:
    run(
        """
import operator, sys, torch_sinkhorn_attn
assert operator.attrgetter(sys.argv[1])(torch_sinkhorn_attn)
torch = sys.modules["torch"]
plans = ("plan", "plan_backward", "log_plan", "log_plan_backward", "matches", "band")
for name in ("forward", "backward", *plans, "scan_mask"):
    assert callable(getattr(torch.ops.torch_sinkhorn_attn, name))
""",
        name,
    )


@pytest.mark.slow
@pytest.mark.parametrize("first", ["torch", "torch_sinkhorn_attn"])
def test_an_exported_program_needs_the_import_alone(first: str, tmp_path: Path) -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return torch_sinkhorn_attn.sinkhorn_attention(q, q, q, mask)

    x, mask = torch.randn(1, 2, 6, 4), torch.zeros(6, 6)
    torch.export.save(torch.export.export(Attention(), (x, mask)), tmp_path / "program.pt2")
    torch.save((x, mask, Attention()(x, mask)), tmp_path / "tensors.pt")
    run(
        """
import importlib, sys
importlib.import_module(sys.argv[1])
import torch, torch_sinkhorn_attn
x, mask, truth = torch.load(sys.argv[2] + "/tensors.pt")
program = torch.export.load(sys.argv[2] + "/program.pt2")
assert torch.allclose(program.module()(x, mask), truth, atol=1e-6)
""",
        first,
        str(tmp_path),
    )


@pytest.mark.slow
def test_a_pickled_module_finds_its_class(tmp_path: Path) -> None:
    torch.save(torch_sinkhorn_attn.SinkhornMultiheadAttention(8, 2), tmp_path / "module.pt")
    run(
        """
import sys, torch
module = torch.load(sys.argv[1], weights_only=False)
assert type(module).__name__ == "SinkhornMultiheadAttention"
assert module(*[torch.randn(1, 5, 8)] * 3)[0].shape == (1, 5, 8)
""",
        str(tmp_path / "module.pt"),
    )


@pytest.mark.slow
def test_names_are_found_however_they_are_asked_for() -> None:
    run(
        """
import torch_sinkhorn_attn, torch
assert set(torch_sinkhorn_attn.__all__) <= set(dir(torch_sinkhorn_attn))
attend = torch.compile(lambda q: torch_sinkhorn_attn.sinkhorn_attention(q, q, q), fullgraph=True, backend="eager")
q = torch.randn(1, 5, 4)
assert attend(q).shape == q.shape
from torch_sinkhorn_attn import *
assert all(globals()[name] is getattr(torch_sinkhorn_attn, name) for name in torch_sinkhorn_attn.__all__)
assert torch_sinkhorn_attn.engines.cpu.NAME == "cpu"
assert torch_sinkhorn_attn.method.reference.__name__.endswith("reference")
from torch_sinkhorn_attn.engines import ENGINES
from torch_sinkhorn_attn.engines.tiled.engine import ENGINE as tiled
assert ENGINES["tiled"] is tiled
for package in (torch_sinkhorn_attn, torch_sinkhorn_attn.engines, torch_sinkhorn_attn.engines.tpu):
    try:
        package.nonsense
    except AttributeError as error:
        assert f"module '{package.__name__}' has no attribute 'nonsense'" in str(error)
    else:
        raise AssertionError("nonsense was found")
"""
    )


def test_the_jax_half_imports_no_torch_though_it_is_installed() -> None:
    pytest.importorskip("jax")
    run("import sys; from torch_sinkhorn_attn.engines.tpu import sinkhorn_attention; assert 'torch' not in sys.modules")
