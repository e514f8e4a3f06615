"""`benchmarks/gpu.py` without a GPU: what it says, and that its parts run, tiny and interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.slow
def test_without_a_gpu_it_says_what_to_run() -> None:
    done = run()
    assert done.returncode == 3 and "--static" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    [
        "attention",
        *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ("compile", "conform", "half-steps", "properties")),
    ],
)
def test_its_parts_run(part: str) -> None:
    done = run("--part", part, "--dry")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
