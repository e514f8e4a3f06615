"""What XLA tensors need that eager ones do not; see `engines.traits`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_sinkhorn_attn.engines.traits import each_tensor


def placed(x: Tensor, source: Tensor) -> Tensor:
    """x `[N, H, L, E]`, made from the user's `source`, marked as lying on the devices that source lies on."""
    from torch_sinkhorn_attn.engines.xla import spmd

    return spmd.carry(x, source)


def fetched(tree: Any) -> Any:
    """Copies on the CPU in place of XLA tensors, computed in one graph."""
    from torch_xla import _XLAC  # type: ignore[attr-defined]

    found: list[Tensor] = []
    each_tensor(tree, found.append)
    copies = iter(_XLAC._xla_get_cpu_tensors(found))
    return each_tensor(tree, lambda _: next(copies))
