"""Problems spread over the ranks of a job, one TPU each: a rank's tensors are its shard of the batch, of the heads and
of the tokens.

Problems are independent, so without a word of this each rank computes its own, and data and tensor parallelism are
right as they are. What `set_sharding` adds: the kernels run as one program over the mesh, which knows each shard's
place in the whole, so that dropout is that of one device with all of the batch; and tokens may lie along an axis too
(`sequence`).
"""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax.sharding import Mesh, PartitionSpec

from torch_sinkhorn_attn.engines.binding.shards import BATCH, HEADS, TOKENS, axes
from torch_sinkhorn_attn.engines.torchtpu.program import Program, Shape, parse


@contextmanager
def experimental() -> Iterator[None]:
    """Around what torch_tpu says is experimental: our users did not choose it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* is experimental and subject to change")
        yield


@dataclass(frozen=True)
class Place:
    """A mesh over all ranks, and the axes of it that batch, heads and tokens lie along; None for none."""

    mesh: Mesh
    batch: str | None
    heads: str | None
    sequence: str | None = None

    def spec(self, lie: Sequence[int | None]) -> PartitionSpec:
        """Of an array whose dimensions lie along BATCH, HEADS, TOKENS or None; those at the end that lie along none are
        left out."""
        along = {BATCH: self.batch, HEADS: self.heads, TOKENS: self.sequence}
        names = [along.get(x) if x is not None else None for x in lie]
        while names and names[-1] is None:
            names.pop()
        return PartitionSpec(*names)


_place: Place | None = None


def set_sharding(
    shape: Mapping[str, int] | None, batch: str | None = None, heads: str | None = None, sequence: str | None = None
) -> None:
    """Say, once torch.distributed is initialised, that each rank's tensors are its shard; None takes it back.

    Lengths, segments and masks are sharded with the batch (and heads) that they belong to; the seed of dropout must be
    the same on all ranks (`torch.manual_seed`). The gradient of what ranks share is on each its own part, as with
    every parameter under DistributedDataParallel.

    Args:
        shape: the axes of the mesh and their sizes, whose product is the number of ranks, rank 0 first and the last
            axis fastest.
        batch: the axis that the first dimension of query lies along.
        heads: likewise for the heads of query and key.
        sequence: likewise for the tokens: `sinkhorn_attention` then takes this rank's block of queries and of keys, as
            many on each, and what belongs to them, as JAX's takes them inside `jax.shard_map` (docs/jax.md): lengths
            count the tokens of all ranks, attn_mask has local queries and all keys. Other functions refuse.

    Raises:
        ValueError: an axis that the mesh has not, one used twice, or sizes that do not make up the ranks (torch_tpu's).

    >>> set_sharding({"data": 4, "model": 2}, batch="data", heads="model")  # doctest: +SKIP
    """
    global _place
    if shape is None:
        _place = None
        return
    used: dict[str, str] = {}
    for argument, axis in (("batch", batch), ("heads", heads), ("sequence", sequence)):
        if axis is None:
            continue
        if axis not in shape:
            raise ValueError(f"{argument}={axis!r} is not an axis of the mesh; its axes are {list(shape)}.")
        if axis in used:
            raise ValueError(f"{used[axis]} and {argument} both name {axis!r}; give each axis of the mesh one use.")
        used[axis] = argument
    with experimental():
        mesh = torch.tpu.pallas.get_pallas_mesh(tuple(shape), tuple(shape.values()))  # type: ignore[attr-defined]
    _place = Place(mesh, batch, heads, sequence)


def placement() -> Place | None:
    """What `set_sharding` said."""
    return _place


@dataclass(frozen=True)
class Sharded:
    """A program's arrays on a mesh. An op takes one partition spec for all arrays of a list, so they come in as many
    lists as there are specs.

    Attributes:
        place: the mesh.
        program_function: the name of the program's function.
        specs: of each leaf.
        results: the names of the results and their specs.
        read: what makes the program of its text.
    """

    place: Place
    program_function: str
    specs: tuple[PartitionSpec, ...]
    results: tuple[tuple[str, PartitionSpec], ...]
    read: Callable[[str], Any] = parse

    @property
    def name(self) -> str:
        """Of the op: there is one for each way that arrays lie."""
        told = repr((self.place, self.specs, self.results)).encode()
        return f"{self.program_function}_{hashlib.sha256(told).hexdigest()[:16]}"

    @property
    def _kinds(self) -> list[PartitionSpec]:
        return list(dict.fromkeys(self.specs))

    def grouped(self, leaves: Sequence[Any]) -> list[list[Any]]:
        """The leaves in lists, one for each spec."""
        return [[x for x, spec in zip(leaves, self.specs, strict=True) if spec == kind] for kind in self._kinds]

    def ungrouped(self, groups: Sequence[Sequence[Any]]) -> list[Any]:
        """The leaves."""
        kinds = {kind: iter(group) for kind, group in zip(self._kinds, groups, strict=True)}
        return [next(kinds[spec]) for spec in self.specs]

    def partition_specs(self) -> dict[str, Any]:
        """What the registration is told: a spec for each list (and none for the program), and for each result."""
        return {
            "input_partition_specs": (*self._kinds, None),
            "output_partition_specs": [spec for _, spec in self.results],
        }

    def function(self) -> Callable[..., list[jax.Array]]:
        """The JAX function of the lists and the program, annotated as the registration wants it."""

        def on_the_mesh(*given: Any) -> list[jax.Array]:
            program = self.read(given[-1])
            leaves = self.ungrouped(given[:-1])
            if "head_index" in program.names:  # each rank counts its own from 0: this counts all
                at = program.names.index("head_index")
                shape = leaves[at].shape
                leaves[at] = jnp.arange(shape[0] * shape[1], dtype=jnp.int32).reshape(shape)
            compute = jax.shard_map(
                lambda *local: list(program(local).values()),
                mesh=self.place.mesh,
                in_specs=self.specs,
                out_specs=[spec for _, spec in self.results],
                check_vma=False,
            )
            return compute(*leaves)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        lists = [f"leaves_{i}" for i in range(len(self._kinds))]
        parameters = [inspect.Parameter(name, kind, annotation=list[jax.Array]) for name in lists]
        parameters.append(inspect.Parameter("program", kind, annotation=str))
        signature = inspect.Signature(parameters, return_annotation=list[jax.Array])
        on_the_mesh.__signature__ = signature  # type: ignore[attr-defined]
        return on_the_mesh

    def result_types(self, leaves: Sequence[jax.ShapeDtypeStruct], text: str) -> list[tuple[tuple[int, ...], str]]:
        """Shapes and dtypes of a rank's results, from its leaves, by tracing."""

        def sized(shape: Sequence[int], spec: PartitionSpec, whole: bool) -> tuple[int, ...]:
            sizes = [1 if name is None else self.place.mesh.shape[name] for name in (*spec, *[None] * len(shape))]
            return tuple(n * k if whole else n // k for n, k in zip(shape, sizes))

        every = [
            jax.ShapeDtypeStruct(sized(x.shape, spec, True), x.dtype)
            for x, spec in zip(leaves, self.specs, strict=True)
        ]
        found = jax.eval_shape(lambda *groups: self.function()(*groups, text), *self.grouped(every))
        specs = [spec for _, spec in self.results]
        return [(sized(x.shape, spec, False), str(x.dtype)) for x, spec in zip(found, specs, strict=True)]


def sharded(program: Program, shapes: Mapping[str, Shape], place: Place) -> Sharded:
    """How the arrays of a program with leaves of these shapes, a rank's, lie."""
    query = shapes["query"]

    def spec(name: str, shape: Shape) -> PartitionSpec:
        lie = axes(name, len(shape))
        if name == "mask":  # what is not as long as the query's is shared
            lie = tuple(axis if shape[i] == query[i] else None for i, axis in enumerate(lie))
        return place.spec(lie)

    results = program.results(shapes)
    return Sharded(
        place,
        program.function,
        tuple(spec(name, shapes[name]) for name in program.names),
        tuple((name, spec(name, shape)) for name, shape in results.items()),
    )
