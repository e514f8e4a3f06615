"""A word, once for each kind of device, where the kernels made for it cannot take a call and a slower engine does."""

from __future__ import annotations

import warnings

from torch_sinkhorn_attn.compat.callers import users_level
from torch_sinkhorn_attn.compat.releases import constant_in_programs

_said: set[str] = set()  # types of devices


class MissingKernelsWarning(UserWarning):
    """Tensors are computed many times slower than they could be."""


@constant_in_programs  # said while a program is compiled
def warn_once(device: str, own: str, reason: str, taken: str) -> None:
    """Warn, once in a process for each type of `device`, that engine `taken` stands in for its `own`, which gives a
    reason; and how not to hear of it."""
    if device in _said:
        return
    _said.add(device)
    kind = device.upper()
    warnings.warn(
        f"engine={taken!r} computes {kind} tensors here, some ten times slower than the kernels of engine {own!r}, "
        f"which cannot: {reason}. With engine={taken!r} given, or "
        f"warnings.filterwarnings('ignore', message='engine=.* computes {kind} tensors'), this is not said again.",
        MissingKernelsWarning,
        stacklevel=users_level("torch"),
    )
