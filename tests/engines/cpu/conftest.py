"""What the tests of this folder change and put back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from torch_sinkhorn_attn.engines import cpu


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Threads, instruction set and workspace budget."""
    threads, capability, budget = torch.get_num_threads(), cpu.capability(), cpu.workspace_budget()
    yield
    torch.set_num_threads(threads)
    cpu.set_capability(capability)
    cpu.set_workspace_budget(budget)
