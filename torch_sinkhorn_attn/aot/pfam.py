"""The torch_xla training step of examples/pfam, compiled for all devices of a TPU slice.

torch_xla records the step on as many virtual devices of XLA's CPU as the slice has, with the attention lowered for the
TPU; what would run next is compiled instead, by the TPU's compiler. Forward, backward, the all-reduce of the gradients
and the update are one program. Runs in a process whose CPU_NUM_DEVICES is set before torch_xla is imported.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import asdict
from typing import Any

from torch_sinkhorn_attn.aot.attention import devices
from torch_sinkhorn_attn.aot.bundles import clear, read
from torch_sinkhorn_attn.aot.environment import prepare


def compile_step(
    *,
    pairs: int,
    length: int,
    window: int,
    base_iters: int,
    tail_iters: int,
    dim: int,
    fsdp: int,
    topology: str,
    shape: str,
) -> dict[str, Any]:
    """Compile the step; what came out, ready for JSON. The options are those of the command line."""
    folder = prepare()
    slice_ = devices(topology)
    count = slice_["devices"]
    os.environ["CPU_NUM_DEVICES"] = str(count)
    from examples.pfam.config import Config
    from torch_sinkhorn_attn.engines.xla import binding, set_lowering, sharded

    binding.platform = lambda: "tpu"
    binding.device_kind = lambda: slice_["device_kind"]
    set_lowering(shape)
    config = Config(
        batch_size=pairs * count, batch_cells=2**40, cap=length, window=window or None, dim=dim,
        base_iters=base_iters, tail_iters=tail_iters, gradient="tail", train_rounds=1,
    )  # fmt: skip
    recorded, described = _record(config, fsdp)
    clear(folder)
    stats = _compile(recorded, topology, count).get_compiled_memory_stats()
    layout = f"{config.batch_size} pairs in {described.replace('(CPU)', '(virtual)')}"
    return {**asdict(read(stats, folder)), **slice_, "layout": layout, "shape": str(sharded.lowering().shape)}


def _record(config: Any, fsdp: int) -> tuple[bytes, str]:
    """The program of a training step as an HLO module, and the devices it is for, in words."""
    from torch_xla import _XLAC  # type: ignore[attr-defined]

    from examples.pfam.device import XlaDevice
    from examples.pfam.train import Trainer

    class Recorder(XlaDevice):
        results: tuple[Any, ...] = ()
        program = b""

        def finish_step(self) -> None:
            if self.results:
                self.program = _XLAC._get_xla_tensors_hlo_proto([*trainer.losses_unread, *self.results])
            else:
                super().finish_step()

    device = Recorder(fsdp)
    trainer = Trainer(config, os.devnull, device=device)
    state = trainer.optimizer.state
    device.results = tuple(
        tensor for parameter in trainer.model.parameters() for tensor in (parameter, *state[parameter].values())
    )
    trainer.train_on(trainer.sampler.batch(0))
    return device.program, device.describe()


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
