"""Which kinds of tensors the arguments may be: plain strided ones, and what stands for them inside of torch."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from torch_sinkhorn_attn.compat.releases import FakeTensor, FunctionalTensor, materialized
from torch_sinkhorn_attn.engines import engine_of

_PLAIN = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
_WAYS_OUT = {
    "DTensor": "pass x.full_tensor(), or x.to_local() where batch and heads are sharded",
    "MaskedTensor": "pass x.to_tensor(0.0), and its mask as attn_mask or lengths",
    "AsyncCollectiveTensor": "wait for it: x.wait()",
}
_OTHER_WAY_OUT = "pass a plain tensor: x.as_subclass(torch.Tensor), if it holds the values"


def check_kind(name: str, x: Tensor) -> None:
    """Refuse what does not hold its values as a plain tensor does: nested, sparse, or of a subclass that only its own
    class can read. `x` is a tensor.

    Raises:
        TypeError: with the kind and the way out.
    """
    if x.is_nested:
        raise TypeError(f"{name} is a nested tensor; pad it (x.to_padded_tensor(0)) and pass lengths or segment ids.")
    kind = type(x)
    if kind not in _PLAIN and kind.__module__.partition(".")[0] not in engine_of(x.device).wrappers:
        way_out = _WAYS_OUT.get(kind.__name__, _OTHER_WAY_OUT)
        raise TypeError(f"{name} is a {kind.__name__}, a subclass of torch.Tensor that is not understood; {way_out}.")
    if x.layout != torch.strided:
        raise TypeError(f"{name} has layout {x.layout}; pass a dense tensor: {name}.to_dense().")


def plain_mask(mask: Any, device: torch.device) -> Any:
    """An attn_mask of torch's own making that holds no values as the bool mask (True = keep) it stands for; any other
    as it is.

    Raises:
        TypeError: for a BlockMask.
    """
    causal = _class("torch.nn.attention.bias", "CausalBias")
    if causal is not None and isinstance(mask, causal):
        return materialized(mask, device)
    block = _class("torch.nn.attention.flex_attention", "BlockMask")
    if block is not None and isinstance(mask, block):
        raise TypeError(
            "attn_mask is a BlockMask of flex_attention, which is not understood; pass the bool tensor of its "
            "mask_mod, torch.nn.attention.flex_attention.create_mask(mask_mod, B, H, L, S, device), or say it by "
            "window, lengths or segment ids, which take no L x S memory."
        )
    return mask


def _class(module: str, name: str) -> Any:
    """A class of a module that takes long to import; None if nobody has imported it, and so nothing is of it."""
    return getattr(sys.modules.get(module), name, None)
