"""Nested tensors in and out of the module: nn.TransformerEncoder makes them of padded batches in evaluation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn.compat.releases import nested_of, nested_sizes


class Padded(NamedTuple):
    """A nested tensor's dense form."""

    dense: Tensor  # [N, longest, E], zeros beyond the lengths
    lengths: Tensor  # [N] int64, on the tensor's device

    @property
    def padding(self) -> Tensor:
        """`[N, longest]` bool, True beyond the lengths."""
        return torch.arange(self.dense.shape[1], device=self.lengths.device) >= self.lengths[:, None]


def pad(x: Any) -> Padded:
    """Dense form of a nested `[N, *, E]`, of either layout."""
    if x.layout == torch.jagged:
        if x.lengths() is not None:
            raise TypeError("nested tensors with holes (made by narrow) are not supported; pass x.contiguous().")
        return Padded(torch.nested.to_padded_tensor(x, 0.0), x.offsets().diff())
    sizes = nested_sizes(x)
    if (sizes[:, 1:] != sizes[:1, 1:]).any():
        raise ValueError(f"nested tensors must have one number of features, got components of sizes {sizes.tolist()}.")
    dense = torch.nested.to_padded_tensor(x, 0.0)
    return Padded(dense, sizes[:, 0].to(dense.device))


def unpad(dense: Tensor, padded: Padded, like: Any) -> Tensor:
    """The nested tensor of `dense` `[N, longest, E]`, with the layout and the lengths of `like`, whose form is
    `padded`."""
    keep = ~padded.padding
    if like.layout == torch.jagged:
        return torch.nested.nested_tensor_from_jagged(dense[keep], like.offsets())
    return nested_of(dense, keep)
