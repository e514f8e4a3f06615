"""A word, once, where CPU tensors are computed without the C++ kernels because these were not built."""

from __future__ import annotations

import warnings

from torch_sinkhorn_attn.compat.callers import users_level
from torch_sinkhorn_attn.compat.releases import constant_in_programs
from torch_sinkhorn_attn.engines import cpu

_said = False


class MissingKernelsWarning(UserWarning):
    """CPU tensors are computed many times slower than they could be."""


@constant_in_programs  # said while a program is compiled
def warn_once(taken: str) -> None:
    """Warn, once in a process, that engine `taken` stands in for "cpu", and how to mend it or not to hear of it."""
    global _said
    reason = cpu.unavailable()
    if _said or reason is None:
        return
    _said = True
    warnings.warn(
        f"engine={taken!r} computes CPU tensors here, some ten times slower than the C++ kernels of engine 'cpu', "
        f"which are missing: {reason}. With engine={taken!r} given, or "
        f"warnings.filterwarnings('ignore', message='engine=.* computes CPU tensors'), this is not said again.",
        MissingKernelsWarning,
        stacklevel=users_level("torch"),
    )
