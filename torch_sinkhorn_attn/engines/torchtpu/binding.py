"""The functions of `program` as ops of torch_tpu, registered when first called: tensors in, tensors out.

`torch.tpu.pallas.jax_op` is all that is asked of torch_tpu. Its own fake kernels trace the JAX function and take no
symbolic sizes; ours know the shapes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import torch
from torch import Tensor

from torch_sinkhorn_attn._ops import add_op_namespace_prefix
from torch_sinkhorn_attn.engines.binding import program as shared
from torch_sinkhorn_attn.engines.binding.library import Tensors
from torch_sinkhorn_attn.engines.torchtpu import mesh, program
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
from torch_sinkhorn_attn.engines.tpu.releases import enable_x64
from torch_sinkhorn_attn.problem.problem import compute_dtype


def platform() -> str:
    """JAX's name for torch_tpu's device: it has no other."""
    return "tpu"


@functools.cache
def device_kind() -> str:
    """What the device calls itself; "TPU" where none is attached."""
    with mesh.experimental():
        return str(torch.tpu.get_device_name())  # type: ignore[attr-defined]


def lowering() -> Lowering:
    """What was asked for, or what suits the device."""
    return shared.lowering(platform(), device_kind)


def jax_op(name: str, function: Callable[..., Any], **sharding: Any) -> Any:
    """torch_tpu's registration of a JAX function as an op."""
    with mesh.experimental():
        return torch.tpu.pallas.jax_op(name, function, **sharding)  # type: ignore[attr-defined]


@functools.cache
def op(function: str) -> Any:
    """The op of a function of `program`: `op(leaves, program)`."""
    found = jax_op(add_op_namespace_prefix(f"tpu_{function}"), getattr(program, function))
    found.register_fake(_fake)
    return found


def _fake(leaves: Sequence[Tensor], program_text: str) -> list[Tensor]:
    made = program.parse(program_text)
    given = dict(zip(made.names, leaves, strict=True))
    shapes = made.results({name: tuple(x.shape) for name, x in given.items()}).values()
    query = given["query"]
    return [query.new_empty(shape, dtype=compute_dtype(query.dtype)) for shape in shapes]


@functools.cache
def sharded_op(made: mesh.Sharded) -> Any:
    """The op of a program whose arrays lie on a mesh: `sharded_op(made)(*made.grouped(leaves), program)`."""
    specs = made.partition_specs()
    found = jax_op(add_op_namespace_prefix(f"tpu_{made.name}"), made.function(), mesh=made.place.mesh, **specs)

    def fake(*groups: Any) -> list[Tensor]:
        leaves = made.ungrouped(groups[:-1])
        if made.read is program.parse:
            return _fake(leaves, groups[-1])
        types = [jax.ShapeDtypeStruct(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in leaves]
        with enable_x64(any(x.dtype == torch.float64 for x in leaves)):
            found = made.result_types(types, groups[-1])
        return [leaves[0].new_empty(shape, dtype=getattr(torch, dtype)) for shape, dtype in found]

    found.register_fake(fake)
    return found


def run(
    function: Callable[..., dict[str, Any]],
    trees: tuple[Tensors, ...],
    statics: dict[str, Any],
    output: Tensor | None = None,
) -> Tensors:
    """The function on the trees, by the op that is registered for it."""
    made, leaves = program.record(function.__name__, trees, statics)
    given = {name: tuple(x.shape) for name, x in zip(made.names, leaves, strict=True)}
    place = mesh.placement()
    if place is None:
        results = op(made.function)(leaves, made.text())
    else:
        sharded = mesh.sharded(made, given, place)
        results = sharded_op(sharded)(*sharded.grouped(leaves), made.text())
    return dict(zip(made.results(given), results, strict=True))
