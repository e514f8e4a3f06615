"""Column vectors of a resident kernel completed by the devices beside it, which run the same kernel on their strips:
remote copies from one kernel's VMEM to another's, so that the strip stays where it is for the whole solve.

A device shares its first `shared` columns with the device before it and its last with the one after (`sequence`). Each
exchange is a message to each of them, in one of two slots by turns: whoever has sent its message k + 1 has read all of
k, so what comes with k + 2 overwrites nothing that is still wanted. At first the neighbours tell each other that their
kernels run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torch_sinkhorn_attn.engines.tpu.method.problem import Statics
from torch_sinkhorn_attn.engines.tpu.method.sequence import Sequence
from torch_sinkhorn_attn.engines.tpu.method.tiles import tile_bytes
from torch_sinkhorn_attn.engines.tpu.resident.strip import BLOCK

SCRATCH = "sent", "got", "send_done", "got_done", "turn"
BEFORE, AFTER = 0, 1


class Neighbours(NamedTuple):
    """What a kernel compiles in: the sequence, and the names of the mesh's axes."""

    sequence: Sequence
    axes: tuple[str, ...]

    @property
    def shared(self) -> int:
        """Columns that a device has in common with a neighbour."""
        assert self.sequence.halo is not None
        return sum(self.sequence.halo)

    def vmem(self, dtype: Any) -> int:
        """Bytes that messages take."""
        return 8 * tile_bytes((1, self.shared), dtype)

    def scratch(self, dtype: Any) -> dict[str, Any]:
        """The kernel's, by the names of `SCRATCH`: messages `[slot, side, 1, shared]`, their semaphores, the number of
        exchanges so far."""
        messages = pltpu.VMEM((2, 2, 1, self.shared), dtype)
        done = pltpu.SemaphoreType.DMA((2, 2))
        return dict(zip(SCRATCH, (messages, messages, done, done, pltpu.SMEM((1,), jnp.int32)), strict=True))


def neighbours_of(statics: Statics) -> Neighbours | None:
    """Those of a problem whose columns halos complete."""
    sequence = statics.sequence
    if sequence is None or sequence.halo is None or not sum(sequence.halo):
        return None
    return Neighbours(sequence, tuple(jax.sharding.get_abstract_mesh().axis_names))


def refusal(statics: Statics, dustbin: bool) -> str | None:
    """Why strips of several devices cannot complete each other's columns; None if they can."""
    sequence = statics.sequence
    if sequence is None:
        return None
    if sequence.halo is None:
        return "every device holds all columns, and resident strips tell their neighbours alone"
    if dustbin or statics.tolerance or (statics.acceleration and not statics.contraction):
        return "a dustbin, a tolerance or an estimated contraction needs a number of all devices in every iteration"
    if any(n % BLOCK for n in (sequence.rows, sequence.cols, *sequence.halo)):
        sizes = f"{sequence.rows} rows, {sequence.cols} columns and halos of {sequence.halo}"
        return f"{sizes} are not in whole blocks of {BLOCK}"
    if sum(sequence.halo) > sequence.cols:
        return f"a window of {sequence.halo} reaches beyond the neighbours' blocks of {sequence.cols}"
    return None


class Exchange:
    """The exchanges of one kernel. `refs` has the fields of `SCRATCH`."""

    def __init__(self, neighbours: Neighbours | None, refs: Any):
        self.neighbours, self.r = neighbours, refs

    def begin(self) -> None:
        """Before the first: in the first grid step, wait for the neighbours' kernels."""
        if self.neighbours is None:
            return

        def meet() -> None:
            self.r.turn[0] = 0
            barrier = pltpu.get_barrier_semaphore()
            for side in (BEFORE, AFTER):
                pl.when(self._there(side))(lambda side=side: self._signal(barrier, side))
            for side in (BEFORE, AFTER):
                pl.when(self._there(side))(lambda: pltpu.semaphore_wait(barrier, 1))

        pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0))(meet)

    def complete(self, own: Array, combine: Callable[[Array, Array], Array]) -> Array:
        """`[1, held]` of the rows here, with the neighbours' parts of the columns in common."""
        if self.neighbours is None:
            return own
        r, count, width = self.r, self.neighbours.shared, own.shape[1]
        turn = r.turn[0]
        slot = lax.rem(turn, jnp.int32(2))
        r.turn[0] = turn + 1
        edges = own[:, :count], own[:, width - count :]
        for side, edge in enumerate(edges):
            r.sent[slot, side] = edge
            pl.when(self._there(side))(lambda side=side: self._copy(slot, side, 1 - side).start())
        for side in (BEFORE, AFTER):
            pl.when(self._there(side))(lambda side=side: self._wait(slot, side))
        first, last = (
            jnp.where(self._there(side), combine(edge, r.got[slot, side]), edge) for side, edge in enumerate(edges)
        )
        middle = [own[:, count : width - count]] if width > 2 * count else []
        return jnp.concatenate([first, *middle, last], 1)

    def _there(self, side: int) -> Array:
        assert self.neighbours is not None
        place = self.neighbours.sequence.place
        return place > 0 if side == BEFORE else place < self.neighbours.sequence.size - 1

    def _device(self, side: int) -> tuple[Array, ...]:
        assert self.neighbours is not None
        step = 1 if side == AFTER else -1
        own = self.neighbours.sequence.axis
        return tuple(lax.axis_index(name) + (step if name == own else 0) for name in self.neighbours.axes)

    def _signal(self, barrier: Any, side: int) -> None:
        pltpu.semaphore_signal(barrier, 1, device_id=self._device(side), device_id_type=pltpu.DeviceIdType.MESH)

    def _copy(self, slot: Array, side: int, there: int) -> Any:
        """What goes to the neighbour on a side, which has this device on its side `there`."""
        r = self.r
        return pltpu.make_async_remote_copy(
            src_ref=r.sent.at[slot, side],
            dst_ref=r.got.at[slot, there],
            send_sem=r.send_done.at[slot, side],
            recv_sem=r.got_done.at[slot, there],
            device_id=self._device(side),
            device_id_type=pltpu.DeviceIdType.MESH,
        )

    def _wait(self, slot: Array, side: int) -> None:
        """For what was sent to a side, and for what comes from there."""
        self._copy(slot, side, 1 - side).wait_send()
        self._copy(slot, side, side).wait_recv()
