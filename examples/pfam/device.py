"""Where a run computes: the CPU, a GPU, XLA devices (TPUs, or XLA's own CPU) through torch_xla, or a TPU through
TorchTPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import objective, static
from .model import Output
from .sampler import Batch

DEVICES = ("cpu", "cuda", "xla", "tpu")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Placed:
    """A batch where it is computed on; `known` are its targets, on devices that want them as tensors."""

    batch: Batch
    known: static.Targets | None = None


class Device:
    """The CPU, and the interface: everything about a run that depends on where it computes.

    Args:
        precision: of linear layers and convolutions in training; the attention itself is float32, and so is evaluation.
    """

    name = "cpu"
    read_every = 1
    """Steps between two readings of the losses; on a device that runs ahead of Python each reading waits for it."""
    one_shape = False
    """Whether every batch is padded to one shape, and so never computed in parts."""
    start_method: str | None = None
    """Of worker processes; the threads of some devices' libraries do not survive a fork."""

    def __init__(self, precision: str = "float32") -> None:
        self.precision_name = precision

    def model(self, model: nn.Module) -> nn.Module:
        """Move the parameters, in place."""
        return model

    def optimizer(self, parameters: Iterable[nn.Parameter], rate: float, decay: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)

    def set_rate(self, optimizer: torch.optim.Optimizer, rate: float) -> None:
        """The learning rate of the next step."""
        for group in optimizer.param_groups:
            group["lr"] = rate

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state, whichever device wrote it."""
        for group in state["param_groups"]:
            group.update({key: optimizer.param_groups[0][key] for key in ("lr", "capturable", "foreach")})
        optimizer.load_state_dict(state)

    def place(self, batch: Batch, size: int, longest: int, learning: bool) -> Placed:
        """A batch of at most `size` pairs with sides of at most `longest`; with its targets if `learning`."""
        return Placed(batch)

    def losses(self, output: Output, placed: Placed, barycentre_weight: float) -> tuple[Tensor, Tensor]:
        """The loss to minimise, and the one to show."""
        pairs = placed.batch.pairs
        loss = objective.training_loss(output, pairs, barycentre_weight)
        return loss, objective.plan_loss(output.last.detach(), pairs)

    def hmm_loss(self, scores: Tensor, log_odds: Tensor, placed: Placed) -> Tensor:
        """The loss where the pair HMM is trained alone."""
        if placed.known is not None:
            return static.runs_loss(scores, log_odds, placed.known)
        return objective.runs_loss(scores, log_odds, placed.batch.pairs)

    def precision(self) -> AbstractContextManager[object]:
        """Around the forward."""
        return torch.autocast(self.name, dtype=torch.bfloat16, enabled=self.precision_name == "bfloat16")

    def seed(self, seed: int) -> None:
        """Of what a training step draws, dropout; given for each step, so that no state need be kept."""
        torch.manual_seed(seed)

    def finish_step(self) -> None:
        """The step is written down: let the device work."""

    def rng_state(self) -> int | None:
        """Of the device's own generator, None if it has none."""
        return None

    def set_rng_state(self, state: int | None) -> None:
        """Put it back; None: it keeps the seed that it was given."""

    def describe(self) -> str:
        """In a line, for the log; empty for the CPU in float32."""
        return "" if self.precision_name == "float32" else f"CPU, {self.precision_name}"


class CudaDevice(Device):
    """A GPU. Batches are square and carry their targets as tensors, so that a step does not wait for the CPU.

    Args:
        index: which one; a run of several processes has one each.
        precision: as ``Device``'s.

    Raises:
        ValueError: this PyTorch sees no such GPU.
    """

    name = "cuda"
    read_every = 25

    def __init__(self, index: int = 0, precision: str = "float32") -> None:
        super().__init__(precision)
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if index >= count:
            raise ValueError(f"--device cuda needs {index + 1} GPU(s) on this machine, PyTorch sees {count}")
        torch.cuda.set_device(index)
        self.device = torch.device("cuda", index)

    def model(self, model: nn.Module) -> nn.Module:
        return model.to(self.device)

    def place(self, batch: Batch, size: int, longest: int, learning: bool) -> Placed:
        count, side = len(batch.pairs), max(batch.query.shape[1], batch.key.shape[1])
        full = static.padded(batch, count, side)
        moved = full.moved(self._moved)
        if not learning:
            return Placed(moved)
        known = static.targets(batch.pairs, count, side)
        return Placed(moved, static.Targets(*map(self._moved, known.tensors())))

    def _moved(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True)

    def losses(self, output: Output, placed: Placed, barycentre_weight: float) -> tuple[Tensor, Tensor]:
        return _static_losses(output, placed, barycentre_weight)

    def describe(self) -> str:
        return f"{torch.cuda.get_device_name(self.device)}, {self.precision_name}"


class CompiledDevice(Device):
    """A device that compiles a program per shape: batches are padded to one, and carry their targets as tensors."""

    read_every = 25
    one_shape = True
    start_method = "forkserver"
    device: torch.device
    count = 1
    """Devices that share the batch."""

    def model(self, model: nn.Module) -> nn.Module:
        return model.to(self.device)

    def place(self, batch: Batch, size: int, longest: int, learning: bool) -> Placed:
        size, length = -(-size // self.count) * self.count, static.bucketed(longest)
        full = static.padded(batch, size, length)
        moved = full.moved(self._moved)
        if not learning:
            return Placed(moved)
        known = static.targets(batch.pairs, size, length)
        return Placed(moved, static.Targets(*map(self._moved, known.tensors())))

    def _moved(self, x: Tensor) -> Tensor:
        return x.to(self.device)

    def losses(self, output: Output, placed: Placed, barycentre_weight: float) -> tuple[Tensor, Tensor]:
        return _static_losses(output, placed, barycentre_weight)


class TpuDevice(CompiledDevice):
    """A TPU through TorchTPU; a run of several processes has one each.

    Args:
        precision: as ``Device``'s.

    Raises:
        ValueError: torch_tpu is missing, or sees no TPU.
    """

    name = "tpu"

    def __init__(self, precision: str = "float32") -> None:
        if importlib.util.find_spec("torch_tpu") is None:
            raise ValueError("--device tpu needs torch_tpu: pip install 'torch_sinkhorn_attn[torchtpu]'")
        found = torch.accelerator.current_accelerator(check_available=True)
        if found is None or found.type != "tpu":
            raise ValueError("--device tpu needs a TPU, and torch_tpu sees none on this machine")
        super().__init__(precision)
        self.device = torch.device("tpu")

    def optimizer(self, parameters: Iterable[nn.Parameter], rate: float, decay: float) -> torch.optim.Optimizer:
        # The rate and the count of steps are tensors: numbers could be constants of a program, compiled anew.
        rates = torch.tensor(rate, device=self.device)
        return torch.optim.AdamW(parameters, lr=rates, weight_decay=decay, capturable=True, foreach=False)

    def set_rate(self, optimizer: torch.optim.Optimizer, rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"].copy_(torch.tensor(rate))

    def describe(self) -> str:
        return f"a TPU (TorchTPU), {self.precision_name}"


class XlaDevice(CompiledDevice):
    """One or several XLA devices: the batch is split among them, the parameters among `fsdp` of them.

    Args:
        fsdp: devices that every parameter is spread over where it divides; the others hold copies.
        precision: of linear layers and convolutions; the attention itself is float32.

    Raises:
        ValueError: torch_xla is missing, or `fsdp` does not divide the devices.
    """

    name = "xla"

    def __init__(self, fsdp: int = 1, precision: str = "float32") -> None:
        if importlib.util.find_spec("torch_xla") is None:
            raise ValueError("--device xla needs torch_xla: pip install 'torch_sinkhorn_attn[tpu]'")
        import numpy as np
        import torch_xla
        import torch_xla.distributed.spmd as xs
        import torch_xla.runtime as xr

        super().__init__(precision)
        self.count = xr.global_runtime_device_count()
        if self.count % fsdp:
            raise ValueError(f"--fsdp {fsdp} does not divide the {self.count} XLA devices")
        self.fsdp = fsdp
        self.mesh: Any = None
        if self.count > 1:
            xr.use_spmd()
            self.mesh = xs.Mesh(np.arange(self.count), (self.count // fsdp, fsdp), ("data", "fsdp"))
            xs.set_global_mesh(self.mesh)
        self.device = torch_xla.device()

    def model(self, model: nn.Module) -> nn.Module:
        super().model(model)
        for parameter in model.parameters():
            self._shard(parameter)
        return model

    def _shard(self, parameter: Tensor) -> None:
        """Spread it over "fsdp" along the first dimension that divides."""
        if self.mesh is None:
            return
        from torch_xla.distributed.spmd.xla_sharding import mark_sharding

        spread = [n % self.fsdp == 0 and n >= self.fsdp > 1 for n in parameter.shape]
        spec = tuple("fsdp" if i == (spread.index(True) if any(spread) else -1) else None for i in range(len(spread)))
        mark_sharding(parameter, self.mesh, spec)

    def optimizer(self, parameters: Iterable[nn.Parameter], rate: float, decay: float) -> torch.optim.Optimizer:
        # Capturable, with a state from the start: the count of steps is a tensor, and the first step is not special.
        adamw = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, capturable=True, foreach=False)
        for parameter in adamw.param_groups[0]["params"]:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            for moment in moments.values():
                self._shard(moment)
            adamw.state[parameter] = {"step": torch.zeros((), device=self.device), **moments}
        self.finish_step()
        return adamw

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        super().load_optimizer(optimizer, state)
        for values in optimizer.state.values():
            for moment in (values["exp_avg"], values["exp_avg_sq"]):
                self._shard(moment)
        self.finish_step()

    def _moved(self, x: Tensor) -> Tensor:
        moved = super()._moved(x)
        if self.mesh is not None:
            from torch_xla.distributed.spmd.xla_sharding import mark_sharding

            mark_sharding(moved, self.mesh, (("data", "fsdp"), *(None,) * (x.ndim - 1)))
        return moved

    def seed(self, seed: int) -> None:
        """Nothing: a seed would be a constant of the program, compiled anew for each step."""

    def finish_step(self) -> None:
        import torch_xla

        torch_xla.sync()

    def rng_state(self) -> int | None:
        import torch_xla.core.xla_model as xm

        return int(xm.get_rng_state())

    def set_rng_state(self, state: int | None) -> None:
        import torch_xla.core.xla_model as xm

        if state is not None:
            xm.set_rng_state(state)

    def describe(self) -> str:
        import torch_xla.runtime as xr

        kind = f"{self.count} XLA device{'s' if self.count > 1 else ''} ({xr.device_type()})"
        mesh = f", a mesh of {self.count // self.fsdp} (data) x {self.fsdp} (fsdp)" if self.mesh is not None else ""
        return f"{kind}{mesh}, {self.precision_name}"


def open_device(name: str, fsdp: int = 1, precision: str = "float32", local_rank: int = 0) -> Device:
    """The device of a name in `DEVICES`; `local_rank` is the process's number on its machine.

    Raises:
        ValueError: it is not to be had, or an option does not suit it.
    """
    if name == "xla":
        return XlaDevice(fsdp, precision)
    if fsdp != 1:
        raise ValueError(f"--fsdp {fsdp} is for --device xla, not {name}")
    if name == "tpu":
        return TpuDevice(precision)
    return CudaDevice(local_rank, precision) if name == "cuda" else Device(precision)


def _static_losses(output: Output, placed: Placed, barycentre_weight: float) -> tuple[Tensor, Tensor]:
    """`Device.losses` from targets that are tensors."""
    assert placed.known is not None
    loss = static.training_loss(output, placed.known, barycentre_weight)
    return loss, static.plan_loss(output.last.detach(), placed.known)


def on_cpu(state: Any) -> Any:
    """A tree of dictionaries, lists and tensors with its tensors on the CPU, for checkpoints."""
    if isinstance(state, Tensor):
        return state.detach().cpu()
    if isinstance(state, Mapping):
        return {key: on_cpu(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(on_cpu(value) for value in state)
    return state
