"""Shared by all tests: one thread each (the suite runs in parallel processes) and checks in their default mode."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import torch_sinkhorn_attn


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch_sinkhorn_attn.set_checks("auto")
