"""When checks that look at data run. Shape and type checks always do."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from torch_sinkhorn_attn.tracing import recording

_MODES = ("auto", "always", "never")
_mode = "auto"


def set_checks(mode: str) -> None:
    """Say when data-dependent checks run (lengths in range, masks without NaN, balanced masses, feasible windows).

    Args:
        mode: "auto" (default): for eager CPU tensors only; never under torch.compile, torch.jit.trace, vmap or fake
            tensors, nor on accelerators, where looking at data would force a host synchronisation. "always": on every
            device, at that price. "never": not at all. Checks of shapes, types and options always run.

    Raises:
        ValueError: for any other mode.

    >>> set_checks("never")
    >>> set_checks("auto")
    """
    if mode not in _MODES:
        raise ValueError(f"set_checks got mode={mode!r}; choose one of {', '.join(map(repr, _MODES))}.")
    global _mode
    _mode = mode


def data_checks_enabled(*tensors: Tensor | None) -> bool:
    """Whether data-dependent checks run for these tensors."""
    if _mode == "never" or recording():
        return False
    given = [t for t in tensors if t is not None]
    if any(without_data(t) for t in given):
        return False
    return _mode == "always" or all(t.device.type == "cpu" for t in given)


def can_look(x: Tensor) -> bool:
    """Whether looking at the data costs nothing: an eager CPU tensor."""
    return not recording() and not without_data(x) and x.device.type == "cpu"


def has_tangent(x: Tensor) -> bool:
    """Whether the tensor carries a tangent of forward-mode differentiation (outside torch.func)."""
    level = forward_ad._current_level
    return level >= 0 and forward_ad.unpack_dual(x, level=level).tangent is not None


def without_data(t: Tensor) -> bool:
    """Whether the tensor has no memory to look at: fake, meta, or inside a transform of torch.func."""
    return isinstance(t, FakeTensor) or t.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(t)
