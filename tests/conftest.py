"""Shared by all tests: one thread each (the suite runs in parallel processes), checks in their default mode, and JAX on
the CPU, without a look for a TPU.

With JAX and no torch: `python -m pytest tests/engines/tpu`, where modules that compare with torch are skipped.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # no GPU: its kernels on CPU tensors; read when torch imports triton

try:
    import torch
except ImportError:  # where JAX is alone, whose tests need no torch
    torch = None

for _name, _value in {
    "JAX_PLATFORMS": "cpu",
    "PJRT_DEVICE": "CPU",
    # most of the time of a test is XLA's compiler
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "USE_TORCH_XLA": "0",  # else Hugging Face's libraries use XLA's device wherever torch_xla is installed
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}.items():
    os.environ.setdefault(_name, _value)


if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:  # workers have that of the process that started them
    _folder = tempfile.mkdtemp(prefix="inductor-")  # a run that was killed leaves half a library in the usual one
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _folder
    atexit.register(shutil.rmtree, _folder, ignore_errors=True)

_HERE = Path(__file__).parent
collect_ignore = [str(path) for path in _HERE.rglob("*.py") if not path.name.startswith("test_")]  # what tests import


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    if torch is None:
        yield
        return
    from torch_sinkhorn_attn import set_checks

    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    set_checks("auto")
