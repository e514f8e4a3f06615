"""One library for several releases of torch: which it is for is asked before it is loaded."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import torch_sinkhorn_attn
from torch_sinkhorn_attn.compat import releases
from torch_sinkhorn_attn.engines import cpu

PACKAGE = Path(torch_sinkhorn_attn.__file__).parent
A, B = releases.RELEASE


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        (f"{A}.{B}", True), (f"{A}.{B}+", True), (f"{A}.{B - 1}+", True), (f"{A}.{B - 1}", False), ("1.13+", True),
        (f"{A}.{B + 1}", False), (f"{A}.{B + 1}+", False), (f"{A + 1}.0+", False), (f"{A}.{B}0+", False),
    ],
)  # fmt: skip
def test_releases_that_a_library_is_for(text: str, holds: bool) -> None:
    assert releases.among(text) == holds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("serves", "said"), [(f"{A}.{B - 1}", f"{A}.{B - 1} alone"), (f"{A}.{B + 1}+", f"{A}.{B + 1} and later")]
)
def test_a_library_for_another_torch_is_not_touched(tmp_path: Path, serves: str, said: str) -> None:
    """Loading it might end the process; here it would be no library at all."""
    shutil.copytree(PACKAGE, tmp_path / "torch_sinkhorn_attn", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    folder = tmp_path / "torch_sinkhorn_attn/engines"
    (folder / "_cpu.so").write_bytes(b"no library")
    (folder / "_cpu_torch.txt").write_text(serves + "\n")
    program = """
import torch, torch_sinkhorn_attn as package
x = torch.randn(1, 4, 3)
package.sinkhorn_attention(x, x, x)
package.sinkhorn_attention(x, x, x)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"the C++ kernels were built for torch {said}, and this is torch {A}.{B}.") == 1
    assert done.stderr.count("MissingKernelsWarning") == 1 and "pip install . in the source folder" in done.stderr


def test_this_library_is_for_this_torch() -> None:
    assert cpu.unavailable() is not None or releases.among((PACKAGE / "engines/_cpu_torch.txt").read_text().strip())
