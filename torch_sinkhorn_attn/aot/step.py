"""A training step of torch_xla, compiled for all devices of a TPU slice.

torch_xla records the step on as many virtual devices of XLA's CPU as the slice has, with the attention lowered for the
TPU; what would run next is compiled instead, by the TPU's compiler. Forward, backward, the all-reduce of the gradients
and the update are one program. Runs in a process of its own, in which torch_xla was not imported before: see `child`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch_sinkhorn_attn.aot.attention import devices
from torch_sinkhorn_attn.aot.bundles import clear, read
from torch_sinkhorn_attn.aot.environment import prepare


def compile_step(record: Callable[[int], tuple[bytes, str]], topology: str, shape: str) -> dict[str, Any]:
    """Compile a step; what came out, ready for JSON.

    Args:
        record: given the number of devices, runs the step until its program is known; returns that, an HLO module as
            bytes, and how data lie on the devices, in words.
        topology: the slice, as the command line names it.
        shape: which kernels, one of `attention.SHAPES`.
    """
    folder = prepare()
    slice_ = devices(topology)
    count = slice_["devices"]
    os.environ["CPU_NUM_DEVICES"] = str(count)  # before torch_xla is imported
    from torch_sinkhorn_attn.engines.xla import binding, set_lowering, sharded

    binding.platform = lambda: "tpu"
    binding.device_kind = lambda: slice_["device_kind"]
    set_lowering(shape)
    recorded, described = record(count)
    clear(folder)
    stats = _compile(recorded, topology, count).get_compiled_memory_stats()
    layout = described.replace("(CPU)", "(virtual)")
    return {**asdict(read(stats, folder)), **slice_, "layout": layout, "shape": str(sharded.lowering().shape)}


def _compile(module: bytes, topology: str, count: int) -> Any:
    """The HLO module, compiled for `count` devices of the topology by the partitioner."""
    import numpy as np
    from jax.experimental import topologies

    xla_client: Any = importlib.import_module("jax._src.lib").xla_client
    mlir: Any = importlib.import_module("jax._src.interpreters.mlir")
    found: Any = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    options = xla_client.CompileOptions()
    options.num_replicas, options.num_partitions = 1, count
    build = options.executable_build_options
    build.num_replicas, build.num_partitions, build.use_spmd_partitioning = 1, count, True
    build.device_assignment = xla_client.DeviceAssignment.create(np.arange(count).reshape(1, count))
    text = xla_client._xla.mlir.xla_computation_to_mlir_module(xla_client.XlaComputation(module))
    with mlir.make_ir_context():
        bytecode = mlir.module_to_bytecode(mlir.ir.Module.parse(text))
    return found[0].client.compile(bytecode, xla_client.DeviceList(tuple(found)), options)
