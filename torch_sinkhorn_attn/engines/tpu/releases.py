"""What differs between releases of JAX, 0.7.1 to 0.10.2: asked by name, so that releases not yet known are tried."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import jax as _typed

jax: Any = _typed  # types of one release


def enable_x64(new: bool = True) -> AbstractContextManager[None]:
    """A context in which float64 exists, or not: it was in `jax.experimental` up to 0.7."""
    if hasattr(jax, "enable_x64"):
        found: AbstractContextManager[None] = jax.enable_x64(new)
        return found
    from jax.experimental import enable_x64

    return enable_x64(new)


def interpreter(cores: int = 1, **options: Any) -> Any:
    """`pltpu.InterpretParams` for so many cores a device, whose field 0.10 renamed."""
    from jax.experimental.pallas import tpu as pltpu

    parameters: Any = pltpu.InterpretParams
    fields = parameters.__dataclass_fields__
    name = "num_cores_or_threads" if "num_cores_or_threads" in fields else "num_cores_per_device"
    return parameters(**{name: cores}, **options)


def varying_axes(x: Any) -> frozenset[str]:
    """The manual mesh axes that an array varies over, which 0.10 keeps in an attribute of its own."""
    kind = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):
        return frozenset(kind.manual_axis_type.varying)
    return frozenset(getattr(kind, "vma", frozenset()))


def mark_varying(x: Any, axes: tuple[str, ...]) -> Any:
    """x as varying over further axes: `lax.pvary`, which later releases call `lax.pcast`."""
    lax = jax.lax
    return lax.pcast(x, axes, to="varying") if hasattr(lax, "pcast") else lax.pvary(x, axes)
