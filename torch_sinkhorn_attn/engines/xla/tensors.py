"""What XLA tensors need that eager ones do not; see `engines.traits`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_sinkhorn_attn.engines.traits import each_tensor


def inside_op(function: Callable[..., tuple[Tensor, ...]], args: Sequence[Any]) -> tuple[Tensor, ...]:
    """The function on XLA tensors as they are outside of an op, where views are views: inside, the dispatcher has taken
    off the wrapper that makes them so."""
    outside = torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.Functionalize)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), outside):
        wrapped = [torch._to_functional_tensor(x) if isinstance(x, Tensor) else x for x in args]
        results = function(*wrapped)
        for x in results:
            torch._sync(x)  # type: ignore[attr-defined]
        return tuple(torch._from_functional_tensor(x) for x in results)


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
