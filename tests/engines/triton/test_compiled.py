"""The kernels compile to machine code for every generation, without a GPU, and to good code: tensor-core instructions,
shared memory that there is, no spills in the loop, few instructions for each score.

What is compiled is what the engine would launch: its schedule runs on "meta" tensors and its launches are noted, which
also shows that it never waits for the device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from marks import slow_after

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
PER_SCORE = {"half_step": 6.5, "forward_kernel": 2 * 3.5}  # the latter's turn makes two half-steps
SPILLED = {"forward_kernel": 4096, "backward_kernel": 2048}  # bytes, outside of the loop; others
SPILLED_ELSE = 512
OPTIONS = ("window", "dustbin", "bool mask", "float mask", "lengths", "segments", "implicit", "dropout", "tolerance",
           "acceleration", "relaxation")  # fmt: skip


def said(program: str, *arguments: str) -> str:
    """The last line that a process of its own prints, in which triton compiles."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name(program)), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def compiled(target: str, case: str, *kernels: str) -> list[dict[str, Any]]:
    return json.loads(said("compile_kernels.py", target, case, *kernels))


def check(found: list[dict[str, Any]], tensor_cores: bool = True) -> None:
    assert found
    for x in found:
        assert x["shared"] <= x["most shared"], x
        assert x["tensor"] > 0 or not tensor_cores, x
        assert x["spilled"] <= SPILLED.get(x["kernel"], SPILLED_ELSE), x


def check_loop(found: list[dict[str, Any]]) -> None:
    """Of plain problems: what the loop of a usual turn takes."""
    for x in found:
        assert x["per score"] is not None and x["spills in loop"] == 0, x
        assert x["per score"] <= PER_SCORE.get(x["kernel"], float("inf")), x


@pytest.mark.slow
def test_nothing_waits_and_what_is_noted_is_what_would_be_launched() -> None:
    noted, compared = map(int, said("record_launches.py").split())
    assert noted > 1000 and (compared > 100 or not triton.__version__.startswith("3.5"))


@pytest.mark.slow
def test_the_half_step_for_hopper() -> None:
    found = compiled("sm_90", "plain, long", "half_step", "value_pass")
    check(found)
    check_loop(found)
    assert [x["products"] for x in found] == [64.0, 128.0]  # the loop is one tile's, its products by tensor cores


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("target", [x for x in TARGETS if x != "sm_90"])
def test_the_half_step_for_others(target: str) -> None:
    found = compiled(target, "plain, long", "half_step")
    check(found)
    check_loop(found)


@pytest.mark.parametrize("kernel", slow_after(0, ["forward_kernel", "backward_kernel"], {"backward_kernel"}))
def test_resident_kernels(kernel: str) -> None:
    found = compiled("sm_90", "plain, short", kernel)
    check(found)
    if kernel == "forward_kernel":
        check_loop(found)


@pytest.mark.slow
def test_a_window_and_its_adjoint() -> None:
    check(compiled("sm_90", "band", "half_step", "adjoint_pass"))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_float32() -> None:
    """Products in full float32 have no tensor cores."""
    check(compiled("sm_90", "plain, long, float32", "half_step"), tensor_cores=False)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", ["short", "long"])
@pytest.mark.parametrize("option", ["plain", *OPTIONS])
def test_every_option(target: str, shape: str, option: str) -> None:
    names = ("half_step*", "weighted_pass*", "value_pass*", "adjoint_pass*", "mask_gradient*", "forward_kernel*",
             "backward_kernel*")  # fmt: skip
    check(compiled(target, f"{option}, {shape}", *names))
