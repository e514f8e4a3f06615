"""A function that `jax.export` has written to a file, compiled for a TPU: what a binding registers, as handed on."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch_sinkhorn_attn.aot.bundles import compile_and_read
from torch_sinkhorn_attn.aot.environment import prepare


def compile_exported(path: str, topology: str, mesh: dict[str, int] | None = None) -> dict[str, Any]:
    """Compile it; what came out, ready for JSON.

    Args:
        path: of what `jax.export.Exported.serialize` gave.
        topology: such as "v6e:2x4".
        mesh: axes and sizes, where it is for more than one device: all of the topology's.
    """
    prepare()
    import jax
    import jax.export
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    exported = jax.export.deserialize(bytearray(Path(path).read_bytes()))
    shardings: Any = [None] * len(exported.in_avals)
    if mesh is not None:
        devices: Any = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
        devices = devices[: math.prod(mesh.values())]
        shardings = exported.in_shardings_jax(Mesh(np.array(devices).reshape(*mesh.values()), tuple(mesh)))
    leaves = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s) for a, s in zip(exported.in_avals, shardings)]

    def flat(*leaves: Any) -> Any:
        args, kwargs = jax.tree.unflatten(exported.in_tree, leaves)
        return exported.call(*args, **kwargs)

    return asdict(compile_and_read(flat, leaves, topology))
