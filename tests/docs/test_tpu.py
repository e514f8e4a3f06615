"""The code of docs/tpu.md, each block in a process of its own with four virtual devices."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from marks import FAST

PAGE = Path(__file__).parents[2] / "docs" / "tpu.md"
SECTIONS = {text.split("\n", 1)[0]: text for text in PAGE.read_text().split("\n## ")[1:]}
BLOCKS = {
    title: "\n".join(re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S))
    for title, text in SECTIONS.items()
    if "```python" in text
}


def test_the_page_has_them() -> None:
    assert list(BLOCKS) == ["JAX", "torch_xla"]


@pytest.mark.slow
@pytest.mark.parametrize("library", ["JAX", "torch_xla"])
def test_a_step_over_four_devices(library: str) -> None:
    pytest.importorskip(library.lower())
    environment = os.environ | {
        "PJRT_DEVICE": "CPU",
        "CPU_NUM_DEVICES": "4",
        "NPROC": "16",
        "PYTHONPATH": str(PAGE.parents[1]),
    }
    environment["XLA_FLAGS"] = FAST + " --xla_force_host_platform_device_count=4" * (library == "JAX")
    done = subprocess.run([sys.executable, "-c", BLOCKS[library]], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 0 < float(done.stdout) < 3
