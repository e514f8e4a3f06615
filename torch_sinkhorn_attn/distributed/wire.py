"""Tensors between the ranks of a process group: what is sent, counted, with errors that say which group lost whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_FEW = 1 << 12  # numbers that are gathered in one message rather than reduced in two


@dataclass
class Traffic:
    """What this rank has sent: collectives count as their usual algorithms do, which is 2 (P-1)/P of the tensor for an
    all-reduce and (P-1)/P of the result for an all-gather."""

    messages: int = 0
    bytes: float = 0.0

    def add(self, count: float, messages: int = 1) -> None:
        self.messages += messages
        self.bytes += count


traffic = Traffic()  # of this process, since it started


class Wire:
    """A process group, of `size` ranks; `rank` is this one's place in it."""

    def __init__(self, group: Any):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self._share = (self.size - 1) / self.size
        if self.rank < 0:
            raise ValueError("sequence_group: this process is not one of the group's ranks.")

    def all_reduce(self, x: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Reduced over ranks, the same bits on all of them."""
        if self.size == 1 or x.numel() == 0:
            return x
        x = x.clone(memory_format=torch.contiguous_format)
        traffic.add(2 * self._share * _bytes(x))
        self._done(lambda: dist.all_reduce(x, op, group=self.group))
        return x

    def maximum(self, x: Tensor) -> Tensor:
        return self.all_reduce(x, dist.ReduceOp.MAX)

    def lse(self, x: Tensor) -> Tensor:
        """log sum exp over ranks, of vectors that all have in full."""
        if self.size == 1:
            return x
        if x.numel() <= _FEW:
            return self.stacked(x).logsumexp(0)
        top = self.maximum(x)
        safe = top.masked_fill(top == -torch.inf, 0.0)
        return self.all_reduce((x - safe).exp()).log() + safe

    def numbers(self, own: Sequence[int], device: torch.device) -> list[list[int]]:
        """The integers of every rank."""
        x = torch.tensor([own], dtype=torch.int64, device=device)
        return self.stacked(x)[:, 0].tolist()

    def objects(self, own: T) -> list[T]:
        """What every rank has, pickled."""
        found: list[Any] = [None] * self.size
        self._done(lambda: dist.all_gather_object(found, own, group=self.group))
        return found

    def stacked(self, x: Tensor) -> Tensor:
        """`[P, *x.shape]`, for an x of one shape on all ranks."""
        if self.size == 1 or x.numel() == 0:
            return x[None].expand(self.size, *x.shape)
        raw = _raw(x)
        out = raw.new_empty(self.size * raw.numel())
        traffic.add(self._share * _bytes(out))
        self._done(lambda: dist.all_gather_into_tensor(out, raw.flatten(), group=self.group))
        return out.view(self.size, *raw.shape).view(x.dtype)

    def gathered(self, x: Tensor, counts: Sequence[int], dim: int) -> Tensor:
        """The shards of all ranks, of so many lines each, one after the other along `dim`."""
        if self.size == 1:
            return x
        most, lines = max(counts), x.movedim(dim, 0)
        if len(lines) < most:
            lines = torch.cat([lines, lines.new_zeros(most - len(lines), *lines.shape[1:])])
        blocks = self.stacked(lines)
        if min(counts) == most:
            found = blocks.flatten(0, 1)
        else:
            found = torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])
        return found.movedim(0, dim)

    def scattered(self, x: Tensor, counts: Sequence[int], dim: int) -> Tensor:
        """`[P, ...]`: what every rank has for this one, of whose `dim` each rank r is sent `counts[r]` lines."""
        if self.size == 1:
            return x[None]
        raw, own = _raw(x.movedim(dim, 0)), counts[self.rank]
        out = raw.new_empty(self.size * own, *raw.shape[1:])
        traffic.add(_bytes(raw) - own * _bytes(raw[:1]))
        if raw.numel():
            sizes = [own] * self.size, list(counts)
            self._done(lambda: dist.all_to_all_single(out, raw, *sizes, group=self.group))
        return out.view(self.size, own, *raw.shape[1:]).view(x.dtype).movedim(1, dim + 1 if dim >= 0 else dim)

    def swapped(self, parts: dict[int, Tensor], shapes: dict[int, tuple[int, ...]], like: Tensor) -> dict[int, Tensor]:
        """Point to point: `parts[r]` goes to rank r, what comes from it has shape `shapes[r]`; all are as `like`."""
        sent = {r: _raw(x) for r, x in parts.items() if x.numel()}
        found = {r: like.new_empty(shape) for r, shape in shapes.items()}
        into = {r: _raw(x) for r, x in found.items() if x.numel()}
        peers = sorted({*sent, *into})
        ops = [dist.P2POp(dist.isend, sent[r], group=self.group, group_peer=r) for r in peers if r in sent]
        ops += [dist.P2POp(dist.irecv, into[r], group=self.group, group_peer=r) for r in peers if r in into]
        for x in sent.values():
            traffic.add(_bytes(x))
        if ops:
            self._done(lambda: [work.wait() for work in dist.batch_isend_irecv(ops)])
        return found

    def _done(self, collective: Callable[[], T]) -> T:
        try:
            return collective()
        except RuntimeError as error:
            raise RuntimeError(
                f"Sequence-parallel transport: rank {self.rank} of {self.size} waited for the others in vain. One of "
                f"them has ended, raised, or runs another program; the group's own words: {error}"
            ) from error


def _raw(x: Tensor) -> Tensor:
    """The same memory as integers, which every backend moves."""
    x = x.contiguous()
    return x.view(_INTEGERS[x.element_size()]) if x.dtype.is_floating_point or x.dtype == torch.bool else x


_INTEGERS = {1: torch.uint8, 2: torch.uint8, 4: torch.int32, 8: torch.int64}


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
