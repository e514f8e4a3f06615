"""The TorchTPU engine: the JAX programs of `engines/tpu` as ops of torch_tpu, the library whose device is "tpu".

This package alone touches torch_tpu, whose Pallas entry is marked experimental, and imports it only once a tensor is on
its device. `set_lowering` chooses among the kernels, as for torch_xla; `mesh.set_sharding` says how a problem is spread
over the ranks of a job, where that matters.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from torch_sinkhorn_attn.engines.base import each_tensor
from torch_sinkhorn_attn.engines.binding.engine import BoundEngine
from torch_sinkhorn_attn.engines.binding.library import Binding
from torch_sinkhorn_attn.engines.binding.settings import Settings, lowering, set_lowering

__all__ = ["ENGINE", "Settings", "TorchTpuEngine", "lowering", "set_lowering"]
T = TypeVar("T")


class TorchTpuEngine(BoundEngine):
    """The engine of torch_tpu's eager tensors."""

    name = "torchtpu"
    device = "tpu"
    libraries = ("torch_tpu", "jax")
    remedy = "pip install 'torch_sinkhorn_attn[torchtpu]' (Linux on x86_64, Python 3.11 or later, torch 2.11 or later)"
    tensors = "TorchTPU's tensors"
    way_there = "query.to('tpu')"
    kernels = "Pallas kernels on TPUs"

    def binding(self) -> Binding:
        from torch_sinkhorn_attn.engines.torchtpu import binding

        return binding

    def over_ranks(self) -> Callable[..., Any] | None:
        mesh = sys.modules.get("torch_sinkhorn_attn.engines.torchtpu.mesh")
        place = None if mesh is None else mesh.placement()
        if place is None or place.sequence is None:
            return None
        from torch_sinkhorn_attn.engines.torchtpu import sequence

        return sequence.attention

    def fetched(self, tree: T) -> T:
        """Copies on the CPU."""
        copied: T = each_tensor(tree, lambda x: x.cpu())
        return copied


ENGINE = TorchTpuEngine()
