"""Shared by all tests: one thread each (the suite runs in parallel processes), checks in their default mode, and JAX on
the CPU, without a look for a TPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import torch_sinkhorn_attn

for _name, _value in {
    "JAX_PLATFORMS": "cpu",
    "PJRT_DEVICE": "CPU",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",  # most of the time of a test is XLA's compiler
    "USE_TORCH_XLA": "0",  # else Hugging Face's libraries use XLA's device wherever torch_xla is installed
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}.items():
    os.environ.setdefault(_name, _value)


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch_sinkhorn_attn.set_checks("auto")
