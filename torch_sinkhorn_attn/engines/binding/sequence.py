"""The functions of `functions` with the tokens of a problem on several devices: whole arrays in, whole arrays out, and
in between `jax.shard_map`, where devices tell each other what `engines.tpu.method.sequence` says.

Arrays are in even blocks. Those that have dustbins after their tokens come in two, the second named with `BINS`.
Intervals are of rows, counted over all columns; those of columns are not read. Results that are the same for several
devices, or come from them in parts, are summed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from torch_sinkhorn_attn.engines.binding import functions
from torch_sinkhorn_attn.engines.binding.shards import BATCH, BINS, HEADS, TOKENS, axes_with_tokens
from torch_sinkhorn_attn.engines.tpu.front.shards import Outline, banded, held_intervals
from torch_sinkhorn_attn.engines.tpu.method.problem import Statics
from torch_sinkhorn_attn.engines.tpu.method.sequence import Sequence

Arrays = dict[str, Any]
NAMES = {BATCH: "batch", HEADS: "heads", TOKENS: "tokens"}
_IN_PARTS = {"corner_score": (TOKENS,), "dustbin_value": (TOKENS,)}  # cotangents, and over which devices


def solve(inputs: Arrays, constants: Arrays, **statics: Any) -> Arrays:
    """`functions.solve`."""
    return _on_mesh("solve", (inputs, constants), **statics)


def forward(inputs: Arrays, constants: Arrays, **statics: Any) -> Arrays:
    """`functions.forward`."""
    return _on_mesh("forward", (inputs, constants), **statics)


def backward(inputs: Arrays, constants: Arrays, given: Arrays, **statics: Any) -> Arrays:
    """`functions.backward`."""
    return _on_mesh("backward", (inputs, constants, given), **statics)


def statics_of(statics: Statics, sequence: Sequence, even: bool, masked: bool, packed: bool) -> Statics:
    """With the tokens on several devices.

    Args:
        sequence: without halos.
        even: whether the k-th of all queries lies on the device of the k-th of all keys.
        masked, packed: whether there is a mask, or segments.
    """
    window = (statics.window_left, statics.window_right)
    given = None if not statics.banded or window == (-1, -1) else window
    aligned = statics.paired or (statics.uniform and even)
    sequence = banded(sequence, Outline(given, aligned, not (masked or packed)))
    if given is None and statics.banded:  # causality, or segments
        sequence = replace(sequence, joined=False)
    return replace(statics, sequence=sequence, uniform=False)


def dropped_is_of_columns(statics: Statics) -> bool:
    """Whether the dropped cotangent is w^0, of columns, and not z^0."""
    return statics.kept == 0 and not statics.implicit


def spec(name: str, shape: tuple[int, ...]) -> PartitionSpec:
    """Where an array lies; a mask that is shared is everywhere whole."""
    lies = axes_with_tokens(name, len(shape))
    if name == "mask":
        lies = tuple(None if n == 1 else axis for n, axis in zip(shape, lies, strict=True))
    return PartitionSpec(*(None if axis is None else NAMES[axis] for axis in lies))


def _on_mesh(
    function: str, trees: tuple[Arrays, ...], *, mesh: tuple[tuple[str, int], ...], statics: Statics, **options: Any
) -> Arrays:
    """`mesh`: names and sizes of the axes, the last one fastest over the devices."""
    given = [{name: x for name, x in tree.items() if x is not None} for tree in trees]
    names, sizes = zip(*mesh, strict=True)
    abstract = AbstractMesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))

    in_parts: dict[str, tuple[int, ...]] = dict(_IN_PARTS)
    if "mask" in given[0]:  # by the whole mask: a device may have a single one of several
        shape = given[0]["mask"].shape
        in_parts["mask"] = tuple(axis for axis in (BATCH, HEADS, TOKENS) if shape[axis] == 1)

    def local(*trees: Arrays) -> Arrays:
        return _local(function, trees, in_parts, statics, options)

    run = jax.shard_map(
        local,
        mesh=abstract,
        in_specs=tuple({name: spec(name, x.shape) for name, x in tree.items()} for tree in given),
        out_specs=_results(function, given, options),
        check_vma=False,
    )
    found: Arrays = run(*given)
    return found


def _results(function: str, trees: list[Arrays], options: dict[str, Any]) -> dict[str, PartitionSpec]:
    """The results that are there, and where they lie."""
    inputs, bins = trees[0], "log_row_capacity" in trees[1]
    if function == "backward":
        wanted = {name: x.shape for name, x in inputs.items() if name != "mask" or options["mask_grad"]}
        lines = {"dropped": 3}
    else:
        wanted, lines = {}, {"row_potentials": 4, "col_potentials": 4}
    if function == "forward":
        wanted = {"row_residual": (0,) * 2, "col_residual": (0,) * 2}
        wanted |= {"output": (0,) * 4} if "value" in inputs else {}
        wanted |= {"row_dustbin": (0,) * 3, "col_dustbin": (0,) * 3} if bins else {}
    wanted |= {name: (0,) * ndim for name, ndim in lines.items()}
    wanted |= {name + BINS: (0,) * ndim for name, ndim in lines.items() if bins}
    return {name: spec(name, shape) for name, shape in wanted.items()}


def _local(
    function: str,
    trees: tuple[Arrays, ...],
    in_parts: dict[str, tuple[int, ...]],
    statics: Statics,
    options: dict[str, Any],
) -> Arrays:
    """On one device: vectors of columns are of the held in the function, and of the owned outside. The cotangents
    `in_parts` are summed over the devices along their axes."""
    sequence = statics.sequence
    assert sequence is not None
    inputs, constants, *given = (dict(tree) for tree in trees)
    constants["log_col_mass"] = sequence.held(constants["log_col_mass"], fill=-jnp.inf)
    intervals = held_intervals(sequence, constants["row_lo"], constants["row_hi"])
    constants |= dict(zip(("row_lo", "row_hi", "col_lo", "col_hi"), intervals, strict=True))
    for tree in (constants, *given):
        for name in ("col_segment", "initial_col", "col_potentials", "grad_from_bin"):
            if name in tree:
                tree[name] = sequence.held(tree[name])
        for name in [name for name in tree if name.endswith(BINS)]:
            real = name.removesuffix(BINS)
            tree[real] = jnp.concatenate([tree[real], tree.pop(name)], -1)
    found = getattr(functions, function)(inputs, constants, *given, statics=statics, **options)
    found = {name: x for name, x in found.items() if x is not None}
    bins = constants["log_row_capacity"].shape[-1] if "log_row_capacity" in constants else 0
    columns = {"col_potentials", "col_dustbin", *(["dropped"] if dropped_is_of_columns(statics) else [])}
    for name in ("row_potentials", "col_potentials", "dropped"):
        if name in found and bins:
            found[name], found[name + BINS] = jnp.split(found[name], [found[name].shape[-1] - bins], -1)
    if function == "backward":
        for name, axes in in_parts.items():
            if name in found:
                found[name] = lax.psum(found[name], tuple(NAMES[axis] for axis in axes))
    return {name: sequence.owned(x) if name in columns else x for name, x in found.items()}
