"""Windows around centres given as data: row i's window (left, right) holds the keys -left <= j - c_i <= right, with c_i
the centre of query i on the axis of the keys. For torch and for JAX.

Positions are those of the tensors, padding and other segments included. The centres of active queries do not fall;
where nobody looked, one that does is taken to be as high as the highest before it, so that intervals stay monotone.
"""

from __future__ import annotations

from torch_sinkhorn_attn.arrays import Array, namespace

FAR = 1 << 25  # tokens; beyond both the longest side and the widest window


def around(centers: Array, active: Array, window: tuple[int, int], size: int) -> tuple[Array, Array]:
    """Columns [lo, hi) of the window around each of the centres `[N, L]`, of `size` keys; empty at an inactive row, and
    at one whose centre is NaN.

    >>> import torch
    >>> around(torch.tensor([[0.0, 1.5, 4.0]]), torch.tensor([[True, True, True]]), (1, 1), 6)
    (tensor([[0, 1, 3]]), tensor([[2, 3, 6]]))
    """
    xp = namespace(centers)
    held = active & (centers == centers)
    below, above = (xp.running_max(xp.where(held, xp.whole(centers, up, FAR), -FAR)) for up in (False, True))
    left, right = window
    lo = xp.zeros_like(above) if left < 0 else xp.clip(above - left, 0, size)
    hi = xp.zeros_like(below) + size if right < 0 else xp.clip(below + right + 1, 0, size)
    return xp.where(held, lo, 0), xp.where(held & (lo < hi), hi, 0)


def fallen(centers: Array, active: Array) -> Array:
    """Which active queries' centres `[N, L]`, finite and of floating point, lie below that of an active one before."""
    xp = namespace(centers)
    return active & (centers < xp.running_max(xp.where(active, centers, -xp.inf)))
