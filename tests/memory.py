"""A meter of tensor memory: exact, repeatable, and independent of the allocator."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages alive that were made inside, at their most, and the largest single one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self.alive = self.peak = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self._watch(x.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen or size == 0:
            return
        self.seen.add(key)
        self.alive += size
        weakref.finalize(storage, self._forget, key, size)
        self.peak, self.largest = max(self.peak, self.alive), max(self.largest, size)

    def _forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.alive -= size
