"""The XLA engine: pure JAX programs, with Pallas kernels on a TPU, inside torch_xla's lazy graph.

This package alone imports torch_xla, and only once a tensor is on one of its devices. `engines/tpu` holds the programs,
which JAX users may call. `set_lowering` chooses among the kernels; `spmd.sharding` says how tensors lie on several
devices, where their annotations do not.

torch's autograd counts the devices at the first backward of a process: where that may be one on the CPU, call
`torch_xla.device()` before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from torch_sinkhorn_attn.compat.releases import functionalized
from torch_sinkhorn_attn.engines.base import each_tensor
from torch_sinkhorn_attn.engines.binding.engine import BoundEngine
from torch_sinkhorn_attn.engines.binding.library import Binding
from torch_sinkhorn_attn.engines.binding.settings import Settings, lowering, set_lowering
from torch_sinkhorn_attn.problem.looking import has_data

__all__ = ["ENGINE", "Settings", "XlaEngine", "lowering", "set_lowering"]
T = TypeVar("T")


class XlaEngine(BoundEngine):
    """The engine of torch_xla's lazy tensors."""

    name = device = "xla"
    libraries = ("torch_xla", "jax")
    remedy = "pip install 'torch_sinkhorn_attn[tpu]' (Linux on x86_64, Python 3.11 or 3.12)"
    tensors = "XLA tensors"
    way_there = "query.to(torch_xla.device())"
    kernels = "Pallas kernels on TPUs, plain XLA on other XLA devices"

    def binding(self) -> Binding:
        from torch_sinkhorn_attn.engines.xla import sharded

        return sharded

    def call(self, function: Callable[..., tuple[Tensor, ...]], args: Sequence[Any]) -> tuple[Tensor, ...]:
        return functionalized(function, args)

    def placed(self, x: Tensor, source: Tensor) -> Tensor:
        from torch_sinkhorn_attn.engines.xla import spmd

        return spmd.carry(x, source)

    def unsplit(self, *vectors: Tensor) -> tuple[Tensor, ...]:
        from torch_sinkhorn_attn.engines.xla import spmd

        return spmd.everywhere(*vectors) if has_data(*vectors) else vectors

    def fetched(self, tree: T) -> T:
        """Copies on the CPU in place of XLA tensors, computed in one graph."""
        from torch_xla import _XLAC  # type: ignore[attr-defined]

        found: list[Tensor] = []
        each_tensor(tree, found.append)
        copies = iter(_XLAC._xla_get_cpu_tensors(found))
        copied: T = each_tensor(tree, lambda _: next(copies))
        return copied


ENGINE = XlaEngine()
