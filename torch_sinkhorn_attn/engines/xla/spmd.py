"""Manual sharding around a computation: each device works on its own batch elements, heads and tokens.

The partitioner of XLA cannot split a kernel, so the arguments are handed to it in shards: along the two dimensions that
are independent, N and H (`sharded`), and along the tokens, where devices complete each other's sums (`sequence`).
A `Placement` says which device has which shard. It is
found in this order: what `sharding` or `set_sharding` says; the annotation of query (`xs.mark_sharding`), which a
tensor that is still to be computed does not have; a global mesh (`xs.set_global_mesh`) with an axis "fsdp", where the
batch lies along "data", if there is such an axis, and "fsdp".
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import Tensor
from torch_xla import _XLAC  # type: ignore[attr-defined]
from torch_xla.distributed.spmd.xla_sharding import unwrap_sharded_tensor

Axes = str | int | Sequence[str | int] | None  # of a mesh: a name or a place, several, or none


@dataclass(frozen=True)
class Placement:
    """Shards of the batch, of the heads and of the tokens, and copies: (batch, heads, tokens, copies); and the devices,
    in that order."""

    shape: tuple[int, ...]
    devices: tuple[int, ...]

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def heads(self) -> int:
        return self.shape[1]

    @property
    def tokens(self) -> int:
        return self.shape[2]

    def sharding(self, spec: tuple[int | None, ...]) -> Any:
        """The `OpSharding` of a tensor with dimension i along axis spec[i]: 0 the batch, 1 the heads, 2 the tokens."""
        return _mesh(self).get_op_sharding(spec)


@functools.cache
def axes_in_order(placement: Placement) -> tuple[tuple[int, int], ...]:
    """(axis, size) of the placement's shape, such that devices are counted with the last axis fastest.

    Raises:
        ValueError: no order of the axes counts them.
    """
    grid = np.array(placement.devices).reshape(placement.shape)
    origin = (0,) * grid.ndim
    steps = [
        int(grid[(*origin[:i], 1, *origin[i + 1 :])] - grid[origin]) if n > 1 else 0 for i, n in enumerate(grid.shape)
    ]
    order = sorted(range(grid.ndim), key=lambda i: -steps[i])
    if grid.transpose(order).flatten().tolist() != list(range(grid.size)):
        raise ValueError(
            f"a sequence cannot be sharded over the devices {placement.devices} in shards of {placement.shape} (batch, "
            "heads, tokens, copies), for no order of these counts them; make the mesh of numpy.arange(devices), and "
            "let axes that share a dimension follow each other."
        )
    return tuple((i, placement.shape[i]) for i in order)


@functools.cache
def _mesh(placement: Placement) -> xs.Mesh:
    return xs.Mesh(np.array(placement.devices), placement.shape)


_chosen: Placement | None = None


def set_sharding(mesh: xs.Mesh | None, batch: Axes = None, heads: Axes = None, sequence: Axes = None) -> None:
    """Say how query is sharded, for all following calls of this process; mesh=None takes it back.

    Args:
        mesh: of `torch_xla.distributed.spmd`.
        batch: axis or axes of the mesh that the first dimension of query lies along, as in `xs.mark_sharding`.
        heads: likewise for the heads.
        sequence: likewise for the tokens of query, key and value, and all that is given for each token: a problem's
            tokens then lie on several devices, and the numbers are those of one.

    Raises:
        TypeError: a mesh that is none.
        ValueError: an axis that the mesh does not have, or one that is named twice.

    >>> set_sharding(mesh, batch=("data", "fsdp"))  # doctest: +SKIP
    """
    global _chosen
    _chosen = None if mesh is None else _placement(mesh, batch, heads, sequence)


@contextmanager
def sharding(mesh: xs.Mesh, batch: Axes = None, heads: Axes = None, sequence: Axes = None) -> Iterator[None]:
    """`set_sharding` for the calls inside. Their backward needs it no more: it follows the forward.

    >>> with sharding(mesh, batch="data", heads="model"):  # doctest: +SKIP
    ...     output = sinkhorn_attention(query, key, value)
    """
    global _chosen
    before, _chosen = _chosen, _placement(mesh, batch, heads, sequence)
    try:
        yield
    finally:
        _chosen = before


def _placement(mesh: xs.Mesh, batch: Axes, heads: Axes, sequence: Axes) -> Placement:
    if not isinstance(mesh, xs.Mesh):
        raise TypeError(f"mesh must be a torch_xla.distributed.spmd.Mesh, got {mesh!r}.")
    names = list(mesh.shape())
    places = []
    for argument, axes in (("batch", batch), ("heads", heads), ("sequence", sequence)):
        given = () if axes is None else (axes,) if isinstance(axes, (str, int)) else tuple(axes)
        unknown = [x for x in given if x not in names and x not in range(len(names))]
        if unknown:
            raise ValueError(f"{argument}={axes!r} names {unknown[0]!r}, which the mesh has not; its axes are {names}.")
        places.append([x if isinstance(x, int) else names.index(x) for x in given])
    used = [axis for place in places for axis in place]
    if len(set(used)) != len(used):
        told = f"batch={batch!r}, heads={heads!r} and sequence={sequence!r}"
        raise ValueError(f"{told} name an axis twice; give each axis of the mesh one use.")
    rest = [axis for axis in range(len(names)) if axis not in used]
    devices = mesh.get_logical_mesh().transpose([*used, *rest])
    count = [math.prod(mesh.mesh_shape[i] for i in axes) for axes in (*places, rest)]
    return Placement(tuple(count), tuple(devices.flatten().tolist()))


def placement(query: Tensor, output: Tensor | None = None) -> Placement | None:
    """How a problem with this query `[N, H, L, E]` is sharded; None without SPMD, or where nothing says it. What is
    computed from an output `[N, H, L, Ev]` lies where that does.

    Raises:
        ValueError: query is sharded along its features.
    """
    if not xr.is_spmd():
        return None
    if output is not None and (found := annotated(output)) is not None:
        return found
    if _chosen is not None:
        return _chosen
    found = annotated(query)
    if found is not None:
        return found
    mesh = xs.get_global_mesh()
    if mesh is None or mesh.axis_names is None or "fsdp" not in mesh.axis_names:
        return None
    return _placement(mesh, [name for name in ("data", "fsdp") if name in mesh.axis_names], None, None)


def carry(x: Tensor, source: Tensor) -> Tensor:
    """x `[N, H, L, E]`, a reshaping or masking of `source`, with the annotation that source has under SPMD: what is
    computed from an annotated tensor has none."""
    tiles = _tiles(source) if xr.is_spmd() else None
    if tiles is None:
        return x
    x = x.clone()
    _XLAC._xla_annotate_custom_sharding(x, tiles.sharding((0, 1, 2, 3)))
    return x


def everywhere(*vectors: Tensor) -> tuple[Tensor, ...]:
    """Vectors `[..., n]`, replicated under SPMD where one is ragged: XLA's partitioner aborts the process over sorts
    and scatters in blocks that are not even."""
    count = xr.global_runtime_device_count() if xr.is_spmd() else 1
    if not any(x.shape[-1] % count for x in vectors):
        return vectors
    return tuple(_replicated(x.clone(), count) for x in vectors)


def _replicated(x: Tensor, count: int) -> Tensor:
    whole = Placement((1, 1, 1, count), tuple(range(count)))
    _XLAC._xla_annotate_custom_sharding(x, whole.sharding((None,) * x.ndim))
    return x


def annotated(x: Tensor) -> Placement | None:
    """The placement in the annotation of a tensor `[..., H, L, E]`; None if it has none."""
    tiles = _tiles(x)
    if tiles is None:
        return None
    if tiles.shape[3] != 1:
        raise ValueError(
            f"query of shape {tuple(x.shape)} lies on a grid of {tiles.shape[:4]} devices: the features of a token "
            "must stay on one. Mark it along batch, heads and tokens only, or say how its problems shall be sharded: "
            "torch_sinkhorn_attn.engines.xla.spmd.sharding(mesh, batch=..., heads=..., sequence=...)."
        )
    return Placement((*tiles.shape[:3], tiles.shape[4]), tiles.devices)


def _tiles(x: Tensor) -> Placement | None:
    """The annotation of a tensor `[..., H, L, E]` as (batch, heads, tokens, features, copies); None if it has none."""
    text = _XLAC._get_xla_sharding_spec(unwrap_sharded_tensor(x))
    count = xr.global_runtime_device_count()
    if text == "{replicated}":
        return Placement((1, 1, 1, 1, count), tuple(range(count)))
    tiles = re.match(r"\{devices=\[([\d,]+)\]", text)
    if tiles is None:
        return None
    shape = [int(n) for n in tiles[1].split(",")][: x.ndim]
    shape = [math.prod(shape[:-3]), *shape[-3:]]
    return Placement((*shape, count // math.prod(shape)), _devices(text[tiles.end() :], count))


def _devices(text: str, count: int) -> tuple[int, ...]:
    """The devices of an HLO sharding: a list `0,2,1,3`, or an iota `<=[2,2]T(1,0)`."""
    iota = re.match(r"<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota is None:
        listed = re.match(r"[\d,]+", text)
        assert listed is not None, text
        return tuple(int(n) for n in listed[0].split(","))
    order = np.arange(count).reshape([int(n) for n in iota[1].split(",")])
    if iota[2] is not None:
        order = order.transpose([int(n) for n in iota[2].split(",")])
    return tuple(order.flatten().tolist())
