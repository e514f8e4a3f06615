"""Which entries of a mask keep their pair: one rule for every engine."""

from __future__ import annotations

import torch
from torch import Tensor


def kept(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """True where an attn_mask keeps the entry. A float mask drops -inf and anything at or below finfo.min / 2 of its
    own dtype or of the compute dtype it is added in."""
    if mask.dtype == torch.bool:
        return mask
    return ~(mask <= max(torch.finfo(mask.dtype).min, torch.finfo(dtype).min) / 2)  # NaN stays, to be seen
