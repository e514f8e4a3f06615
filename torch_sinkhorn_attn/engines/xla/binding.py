"""A pure JAX function inside torch_xla's lazy graph: lowered once for the tensors' platform, then embedded as HLO.

JAX only traces here; it runs nothing and holds no device. What is lowered is kept, by function, shapes, dtypes, statics
and platform: a step of training that has been seen before traces nothing, and adds one node to the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch_xla
import torch_xla.core.xla_builder as xb
import torch_xla.runtime as xr
from torch import Tensor
from torch_xla import _XLAC  # type: ignore[attr-defined]
from torch_xla._internal.jax_workarounds import requires_jax
from torch_xla._internal.tpu import get_tpu_type

PLATFORMS = {"CPU": "cpu", "TPU": "tpu", "CUDA": "cuda"}  # of torch_xla's devices, as JAX calls them


class _Lowered(NamedTuple):
    embed: Callable[[list[Tensor]], list[Tensor]]
    structure: Any  # the tree the outputs are the leaves of


_lowered: dict[tuple[Any, ...], _Lowered] = {}


def platform() -> str:
    """JAX's name for torch_xla's device; PJRT's own where JAX is not known to have one."""
    device = str(xr.device_type())
    return PLATFORMS.get(device, device)


def device_kind() -> str:
    """What the device calls itself; under SPMD, where torch_xla's device stands for all and knows no kind, what the
    environment of a TPU VM calls it."""
    if xr.is_spmd():
        return f"TPU {get_tpu_type()}"
    return str(_XLAC._xla_device_kind(str(torch_xla.device())))


@requires_jax  # torch_xla takes the TPU before JAX can lock it
def call(function: Callable[..., Any], *arguments: Any, **statics: Any) -> Any:
    """`function(*arguments, **statics)` as one node of the lazy graph.

    Args:
        function: a pure JAX function, the same object at every call.
        arguments: trees (tuples, NamedTuples, dictionaries) of XLA tensors and None.
        statics: hashable Python values, part of the program.

    Returns:
        the tree of the function's results, with tensors in the places of arrays. Nothing is computed yet.
    """
    import jax

    tensors, structure = jax.tree.flatten(arguments)
    types = tuple((x.dtype, tuple(x.shape)) for x in tensors)
    key = function, structure, types, tuple(sorted(statics.items())), platform()
    lowered = _lowered.get(key)
    if lowered is None:
        lowered = _lowered[key] = _lower(*key)
    return jax.tree.unflatten(lowered.structure, lowered.embed(tensors) if lowered.structure.num_leaves else [])


def _lower(
    function: Callable[..., Any],
    structure: Any,
    types: tuple[tuple[torch.dtype, tuple[int, ...]], ...],
    statics: tuple[tuple[str, Any], ...],
    platform: str,
) -> _Lowered:
    import jax

    from torch_sinkhorn_attn.engines.tpu.releases import enable_x64, for_gspmd

    options = dict(statics)

    def flat(*leaves: Any) -> Any:
        return function(*jax.tree.unflatten(structure, leaves), **options)

    with enable_x64(any(dtype == torch.float64 for dtype, _ in types)), for_gspmd():
        shapes = [jax.ShapeDtypeStruct(shape, str(dtype).removeprefix("torch.")) for dtype, shape in types]
        program, results = _program(flat, shapes, platform)
    name = function.__name__
    proto = program.compiler_ir("hlo").as_serialized_hlo_module_proto()
    return _Lowered(xb.xla_computation_as_func(xb.computation_from_module_proto(name, proto), name), results)


def _program(flat: Callable[..., Any], shapes: list[Any], platform: str) -> tuple[Any, Any]:
    """The function lowered for the platform, and the tree of its results.

    For a TPU it goes through `jax.export`, which writes kernels in a form that the libtpu of torch_xla reads: a plain
    lowering writes the newest, which it may refuse.
    """
    import jax
    import jax.export

    function = jax.jit(flat, keep_unused=True)
    if platform == "tpu":
        exported = jax.export.export(function, platforms=[platform])(*shapes)
        function = jax.jit(exported.call, keep_unused=True)
    traced = function.trace(*shapes)
    return traced.lower(lowering_platforms=(platform,)), jax.tree.structure(traced.out_info)
