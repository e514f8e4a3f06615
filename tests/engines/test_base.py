"""Engines say by themselves which tensors are their own: the generic code names no binding to another library."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import torch_sinkhorn_attn
from torch_sinkhorn_attn import engines
from torch_sinkhorn_attn.engines import missing, triton
from torch_sinkhorn_attn.engines.base import each_tensor
from torch_sinkhorn_attn.engines.registry import choose
from torch_sinkhorn_attn.problem.arguments import prepare
from torch_sinkhorn_attn.problem.problem import Inputs

ROOT = Path(torch_sinkhorn_attn.__file__).parent
BINDINGS = {name for name, engine in engines.ENGINES.items() if engine.device not in (None, "cpu")}
LIBRARIES = {"torch_xla", "torch_tpu"}
DEVICES = {str(engines.ENGINES[name].device) for name in BINDINGS} - {"cuda"}  # torch's own, as "cpu" is
ELSEWHERE = [  # the bindings themselves, and the planning of TPU runs, which compiles them
    *(ROOT / "engines" / name for name in BINDINGS),
    ROOT / "engines" / "tpu",
    ROOT / "aot",
]
SHARED = ROOT / "engines" / "binding"  # by the bindings: it may say "tpu", the platform, but not which binding
LISTS = (ROOT / "engines" / "__init__.py", ROOT / "engines" / "registry.py")  # the one place that lists the engines


def names_a_binding(source: str, words_meant: set[str] = BINDINGS | LIBRARIES | DEVICES) -> list[str]:
    """What in a module's code, docstrings aside, says the name of a binding, of its library or of its device."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            words = {node.value, node.value.partition(".")[0]}
        elif isinstance(node, (ast.Name, ast.Attribute)):
            words = {node.id if isinstance(node, ast.Name) else node.attr}
        elif isinstance(node, ast.Import):
            words = {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            words = {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        else:
            continue
        found += [f"line {node.lineno}: {word}" for word in words & words_meant]
    return found


def test_the_generic_code_names_no_binding() -> None:
    assert {"xla", "torchtpu"} <= BINDINGS and "tpu" in DEVICES
    files = [x for x in ROOT.rglob("*.py") if x not in LISTS and not any(x.is_relative_to(y) for y in ELSEWHERE)]
    assert len(files) > 50
    named = {
        str(x.relative_to(ROOT)): names_a_binding(
            x.read_text(), BINDINGS | LIBRARIES | (set() if x.is_relative_to(SHARED) else DEVICES)
        )
        for x in files
    }
    assert not {name: lines for name, lines in named.items() if lines}


@pytest.mark.parametrize(
    "line",
    [
        'x.device.type == "xla"',
        "from torch_sinkhorn_attn.engines import xla",
        "import torch_xla.runtime as xr",
        "engines.xla.NAME",
        'kind.__module__.startswith("torch_xla.")',
    ],
)
def test_that_test_sees(line: str) -> None:
    assert names_a_binding(f'"""xla"""\n{line}') and not names_a_binding('"""xla"""')


def test_each_device_is_the_own_of_one_engine() -> None:
    devices = [engine.device for engine in engines.ENGINES.values() if engine.device is not None]
    assert len(devices) == len(set(devices))
    assert engines.engine_of(torch.device("cpu")) is engines.ENGINES["cpu"]
    meta = engines.engine_of(torch.device("meta"))
    assert meta is engines.ENGINES["tiled"]
    assert not meta.compiles and meta.call(max, (2, 3)) == 3 and meta.fetched((1,)) == (1,)


def test_tensors_of_a_tree() -> None:
    x = torch.ones(2)
    inputs, (flag, half) = each_tensor((Inputs(x, x), (True, x / 2)), lambda x: x + 1)
    assert isinstance(inputs, Inputs) and inputs.value is None and flag is True
    assert inputs.query.tolist() == [2, 2] and half.tolist() == [1.5, 1.5]


def test_what_the_engine_of_a_device_refuses_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next engine that can takes it, and the reason is heard; other devices' engines are not even asked."""
    monkeypatch.setattr(missing, "_said", set())
    monkeypatch.setattr(triton.ENGINE, "device", "meta", raising=False)  # the kind of device that every machine has
    prepared = prepare(*(torch.empty(1, 4, 3, device="meta", dtype=torch.float64) for _ in range(3)))
    with pytest.warns(missing.MissingKernelsWarning, match="META tensors here.*'triton', which cannot") as said:
        assert [choose(None, prepared.inputs, prepared.problem) for _ in range(2)] == ["tiled"] * 2
    assert len(said) == 1
