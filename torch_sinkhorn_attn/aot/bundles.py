"""Compile a JAX function for a TPU that is not there, and read what it takes.

    from torch_sinkhorn_attn.aot.bundles import compile_and_read, weighted
    report = compile_and_read(fn, [jax.ShapeDtypeStruct(...), ...], "v6e:2x4")
    report.memory.temporaries                            # bytes in HBM
    for kernel in report.kernels:
        print(kernel.name, weighted(kernel.loops))       # bundles it issues in all

Call `environment.prepare()`, or `compile_and_read` for the first time, before jax starts its devices.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_sinkhorn_attn.aot.environment import prepare
from torch_sinkhorn_attn.aot.loops import Kernel, Loop, read_kernels, weighted

__all__ = ["Kernel", "Loop", "Memory", "Report", "compile_and_read", "weighted"]


@dataclass(frozen=True)
class Memory:
    """Bytes in HBM of one device's program. `code` is the program itself."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclass(frozen=True)
class Report:
    """A compiled program: its memory, its Pallas kernels, what XLA made of the rest, and the versions that did it."""

    memory: Memory
    kernels: tuple[Kernel, ...]
    fusions: tuple[Kernel, ...]
    versions: str


def compile_and_read(fn: Callable[..., Any], args: Sequence[Any], topology: str) -> Report:
    """Compile `fn(*args)` for one device of a topology, or for those that the arguments' shardings name.

    Args:
        fn: a function that can be jitted; what is static is closed over.
        args: its arguments, trees of `jax.ShapeDtypeStruct` (or of arrays: only shapes and dtypes are used).
        topology: such as "v6e:2x4".

    Raises:
        Exception: whatever the compiler says; `failures.explain` puts it in a line.
    """
    folder = prepare()
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from torch_sinkhorn_attn.engines.tpu.releases import lowered_for_tpu

    device = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices[0]
    place = SingleDeviceSharding(device)

    def placed(a: Any) -> Any:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=getattr(a, "sharding", None) or place)

    shapes = jax.tree.map(placed, list(args))
    clear(folder)
    return read(lowered_for_tpu(fn, shapes, device).compile().memory_analysis(), folder)


def read(stats: Any, folder: Path) -> Report:
    """The report of the program compiled last: its statistics, JAX's or PJRT's, and the folder of its listings."""
    memory = Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
    found = read_kernels(folder)
    pallas, rest = (tuple(kernel for kernel in found if kernel.pallas == kind) for kind in (True, False))
    return Report(memory, pallas, rest, versions())


def clear(folder: Path) -> None:
    """Forget the listings of the program before."""
    for path in folder.iterdir():
        path.unlink()


def versions() -> str:
    """The versions that decide what is compiled, in a few words."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
