"""Several processes on one run: torchrun starts them, DistributedDataParallel averages their gradients.

Every process draws its share of each batch; the first one alone evaluates, writes and reports. Without torchrun there
is one process, and nothing here communicates.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_PATIENCE = timedelta(hours=12)
"""How long the others wait for the first process, which indexes and evaluates alone; torchrun sees to crashes."""

_BACKENDS = {"cuda": "cpu:gloo,cuda:nccl", "tpu": "cpu:gloo,tpu:tpu_dist"}


@dataclass(frozen=True)
class Processes:
    """This process among those of the run; ``local_rank`` is its number on its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """The one that evaluates, writes and reports."""
        return self.rank == 0

    def share_gradients(self, model: nn.Module) -> nn.Module:
        """What to call in training: its backward leaves the mean of the processes' gradients in the model.

        The model starts from the first process's parameters everywhere, and each parameter must take part in each pass.
        """
        if self.world == 1:
            return model
        return DistributedDataParallel(model, broadcast_buffers=False)

    def keep_gradients(self, shared: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Within it, gradients of ``share_gradients``'s module add up in this process alone."""
        return contextlib.nullcontext() if self.world == 1 else cast(DistributedDataParallel, shared).no_sync()

    def total(self, values: Tensor) -> Tensor:
        """The sum over the processes of a tensor on the CPU."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether one of them says so; the same answer everywhere."""
        return bool(self.total(torch.tensor(float(flag))) > 0)

    def describe(self) -> str:
        """In a line, for the log; empty for one process."""
        return "" if self.world == 1 else f"{self.world} processes share each batch"

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """The others wait until the first has left the block, however it leaves it."""
        if not self.first:
            self.any(False)
        try:
            yield
        finally:
            if self.first:
                self.any(False)


@contextlib.contextmanager
def join(device: str) -> Iterator[Processes]:
    """The processes that torchrun started, or this one alone; joined by gloo, and by NCCL between GPUs
    and by torch_tpu's backend between TPUs.

    Raises:
        ValueError: ``device`` is xla, which one process drives.
    """
    world = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if world == 1:
        yield Processes()
        return
    if device == "xla":
        raise ValueError("--device xla drives all chips of a host from one process; start it without torchrun")
    dist.init_process_group(_BACKENDS.get(device, "gloo"), timeout=_PATIENCE)
    try:
        yield Processes(dist.get_rank(), world, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        dist.destroy_process_group()
