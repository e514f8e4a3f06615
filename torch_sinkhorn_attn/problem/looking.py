"""When data may be looked at, and so when the checks of it run. Checks of shapes and types always do."""

from __future__ import annotations

from torch import Tensor
from torch.autograd import forward_ad

from torch_sinkhorn_attn.compat.releases import FakeTensor, forward_level, in_transform, making_fx
from torch_sinkhorn_attn.compat.tracing import recording

_MODES = ("auto", "always", "never")
_mode = "auto"


def set_checks(mode: str) -> None:
    """Say when data-dependent checks run (lengths in range, masks without NaN, balanced masses, feasible windows).

    Args:
        mode: "auto" (default): for eager CPU tensors only; never under torch.compile, torch.jit.trace, vmap or fake
            tensors, nor on accelerators, where looking at data would force a host synchronisation. "always": on every
            device, at that price. "never": not at all. Checks of shapes, types and options always run.

    They also decide whether a call may look at the plan it found, to warn, once in a process, that it is not balanced
    in any useful sense.

    What was not checked can be asked afterwards: `SinkhornAux.status` and `certify` tell problems without a plan.

    Raises:
        ValueError: for any other mode.

    >>> set_checks("never")
    >>> set_checks("auto")
    """
    if mode not in _MODES:
        raise ValueError(f"set_checks got mode={mode!r}; choose one of {', '.join(map(repr, _MODES))}.")
    global _mode
    _mode = mode


def checks() -> str:
    """The mode that `set_checks` set."""
    return _mode


def has_data(*tensors: Tensor | None) -> bool:
    """The rule everything else here goes by: whether the values of all these tensors are there to be read, and what is
    found may decide what is done. Not while a program is traced, which will run on other values."""
    if recording() or making_fx():
        return False
    return not any(without_data(t) for t in tensors if t is not None)


def without_data(t: Tensor) -> bool:
    """Whether the tensor has no memory to look at: fake, meta, or inside a transform of torch.func."""
    return isinstance(t, FakeTensor) or t.is_meta or in_transform(t)


def can_look(*tensors: Tensor | None) -> bool:
    """Whether reading them costs nothing: they have data, in the memory of the CPU."""
    return has_data(*tensors) and all(t.device.type == "cpu" for t in tensors if t is not None)


def data_checks_enabled(*tensors: Tensor | None) -> bool:
    """Whether data-dependent checks run for these tensors."""
    if _mode == "auto":
        return can_look(*tensors)
    return _mode == "always" and has_data(*tensors)


def has_tangent(x: Tensor) -> bool:
    """Whether the tensor carries a tangent of forward-mode differentiation (outside torch.func)."""
    level = forward_level()
    return level >= 0 and forward_ad.unpack_dual(x, level=level).tangent is not None
