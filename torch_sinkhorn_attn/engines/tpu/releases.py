"""What differs between releases of JAX, 0.7.1 to 0.10.2: asked by name where there is one. Releases not yet known are
tried."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import jax as _typed

jax: Any = _typed  # types of one release


def enable_x64(new: bool = True) -> AbstractContextManager[None]:
    """A context in which float64 exists, or not: it was in `jax.experimental` up to 0.7."""
    if hasattr(jax, "enable_x64"):
        found: AbstractContextManager[None] = jax.enable_x64(new)
        return found
    from jax.experimental import enable_x64

    return enable_x64(new)


def for_gspmd() -> AbstractContextManager[Any]:
    """A context in which programs for several devices are written for the partitioner of torch_xla 2.9, GSPMD: 0.7
    writes for Shardy where nothing says otherwise."""
    from jax._src.config import use_shardy_partitioner

    return cast("AbstractContextManager[Any]", use_shardy_partitioner(False))


def interpreter(cores: int = 1, **options: Any) -> Any:
    """`pltpu.InterpretParams` for so many cores a device, whose field 0.10 renamed."""
    from jax.experimental.pallas import tpu as pltpu

    parameters: Any = pltpu.InterpretParams
    fields = parameters.__dataclass_fields__
    name = "num_cores_or_threads" if "num_cores_or_threads" in fields else "num_cores_per_device"
    return parameters(**{name: cores}, **options)


def tpu_kind() -> str | None:
    """What the TPU that a program is traced for calls itself: one that the mesh in use is made of (0.10 tells), or this
    process's own; None where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    kind = str(getattr(getattr(mesh, "abstract_device", None), "device_kind", ""))
    if kind.startswith("TPU"):
        return kind
    return str(jax.devices()[0].device_kind) if jax.default_backend() == "tpu" else None


def use_mesh(mesh: Any) -> AbstractContextManager[Any]:
    """A context in which shardings are read on an abstract mesh; in 0.7 the user's own (`jax.set_mesh`) is all there
    is."""
    use = getattr(jax.sharding, "use_abstract_mesh", None)
    return nullcontext() if use is None else cast("AbstractContextManager[Any]", use(mesh))


def varying_axes(x: Any) -> frozenset[str]:
    """The manual mesh axes that an array, or its type, varies over, which 0.10 keeps in an attribute of its own."""
    kind = x if hasattr(x, "vma") or hasattr(x, "manual_axis_type") else jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):
        return frozenset(kind.manual_axis_type.varying)
    return frozenset(getattr(kind, "vma", frozenset()))


def result_type(shape: tuple[int, ...], dtype: Any, operands: Any) -> Any:
    """What a kernel is told of a result: it varies over the manual mesh axes that any of its operands does. 0.10 keeps
    them in a type of its own, where 0.7 has a set."""
    return jax.ShapeDtypeStruct(shape, dtype, **_varying([jax.typeof(x) for x in jax.tree.leaves(operands)]))


def abstract_result(shape: tuple[int, ...], dtype: Any, operands: Any) -> Any:
    """`result_type` of a primitive, from the types of its operands. 0.10 wants the mesh that its axes are of."""
    kinds = _varying(operands)
    mesh = next((kind.sharding.mesh for kind in operands if varying_axes(kind)), None)
    if mesh is not None and "manual_axis_type" in kinds:
        whole = jax.sharding.PartitionSpec(*[None] * len(shape))
        kinds["sharding"] = jax.sharding.NamedSharding(mesh, whole)
    return jax.core.ShapedArray(shape, dtype, **kinds)


def _varying(kinds: Any) -> dict[str, Any]:
    varying = frozenset().union(*map(varying_axes, kinds))
    given = next((kind.manual_axis_type for kind in kinds if hasattr(kind, "manual_axis_type")), None)
    return {"vma": varying} if given is None else {"manual_axis_type": type(given)(varying=varying)}


def kernel_body(body: Callable[..., None]) -> Callable[..., None]:
    """A kernel's body, whose references vary over no mesh axis: 0.7 leaves them those of the operands, and then refuses
    the conditionals of the body, of whose branches one may have read a reference and the other not."""
    if jax.__version_info__ >= (0, 8):
        return body

    def plain(*refs: Any) -> None:
        for ref in refs:
            kind = ref.aval
            if getattr(kind.inner_aval, "vma", None):
                ref.aval = kind.update(inner_aval=kind.inner_aval.update(vma=frozenset()))
        body(*refs)

    return plain


def mark_varying(x: Any, axes: tuple[str, ...]) -> Any:
    """x as varying over further axes: `lax.pvary`, which later releases call `lax.pcast`."""
    lax = jax.lax
    return lax.pcast(x, axes, to="varying") if hasattr(lax, "pcast") else lax.pvary(x, axes)


def lowered_for_tpu(fn: Callable[..., Any], shapes: list[Any], device: Any, mesh: Any = None) -> Any:
    """`jax.jit(fn)` lowered for a TPU that need not be there, or for the mesh of several.

    0.7.1 writes kernels in a version that its libtpu 0.0.21 refuses; those of exported functions are in an older one.
    Later ones ask the device in use for the layout of a kernel's operands, and have to be told.
    """
    function = jax.jit(fn, keep_unused=True)
    if jax.__version_info__ < (0, 8):
        import jax.export as export

        function = jax.jit(export.export(function, platforms=["tpu"])(*shapes).call, keep_unused=True)
        return function.trace(*shapes).lower(lowering_platforms=("tpu",))
    with use_mesh((mesh or jax.sharding.Mesh([device], ("device",))).abstract_mesh):
        return function.trace(*shapes).lower(lowering_platforms=("tpu",))
