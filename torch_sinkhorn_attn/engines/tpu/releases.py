"""What differs between releases of JAX, 0.7.1 to 0.10.2: asked by name where there is one. Releases not yet known are
tried."""

from __future__ import annotations

from collections.abc import Callable
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


def lowered_for_tpu(fn: Callable[..., Any], shapes: list[Any], device: Any) -> Any:
    """`jax.jit(fn)` lowered for a TPU that need not be there.

    0.7.1 writes kernels in a version that its libtpu 0.0.21 refuses; those of exported functions are in an older one.
    Later ones ask the device in use for the layout of a kernel's operands, and have to be told.
    """
    function = jax.jit(fn, keep_unused=True)
    if jax.__version_info__ < (0, 8):
        import jax.export as export

        function = jax.jit(export.export(function, platforms=["tpu"])(*shapes).call, keep_unused=True)
        return function.trace(*shapes).lower(lowering_platforms=("tpu",))
    sharding = jax.sharding
    with sharding.use_abstract_mesh(sharding.Mesh([device], ("device",)).abstract_mesh):
        return function.trace(*shapes).lower(lowering_platforms=("tpu",))
