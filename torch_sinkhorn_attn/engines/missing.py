"""A word, once, where CPU tensors are computed without the C++ kernels because these were not built."""

from __future__ import annotations

import sys
import warnings

from torch_sinkhorn_attn.compat.releases import constant_in_programs
from torch_sinkhorn_attn.engines import cpu

_ELSEWHERE = (__name__.partition(".")[0], "torch")
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
        stacklevel=_users_level(),
    )


def _users_level() -> int:
    """The stacklevel, for `warn_once`, of the nearest code that is neither torch's nor this package's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _ELSEWHERE:
        level, frame = level + 1, frame.f_back
    return level
