"""The pairs of consecutive steps, drawn in this process or ahead of it by others."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .pairs import Pair


class _Steps(Dataset[list[Pair]]):
    """A step's number to its pairs."""

    def __init__(self, draw: Callable[[int], list[Pair]]) -> None:
        self.draw = draw

    def __getitem__(self, step: int) -> list[Pair]:
        return self.draw(step)


def drawn_ahead(
    draw: Callable[[int], list[Pair]], start: int, stop: int, workers: int = 0, context: str | None = None
) -> Generator[list[Pair], None, None]:
    """``draw(step)`` for the steps from ``start`` up to ``stop``, in order.

    Workers send pairs, not padded batches: tensors would take shared memory, which is scarce in containers, and longer.

    Args:
        draw: a function of nothing but the step, so that workers change only when pairs are drawn.
        workers: processes that draw ahead; 0 draws when asked.
        context: how they are started, of ``multiprocessing.get_context``; None is PyTorch's choice.
    """
    if workers == 0:
        yield from map(draw, range(start, stop))
        return
    loader: DataLoader[Any] = DataLoader(
        _Steps(draw),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        prefetch_factor=8,
        collate_fn=_unchanged,
        worker_init_fn=_ignore_interrupts,
        multiprocessing_context=context,
        generator=torch.Generator(),  # else it would draw a number from the global generator
    )
    yield from loader


def _unchanged(pairs: Any) -> Any:
    return pairs


def _ignore_interrupts(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal; the one that trains finishes its step, and needs batches for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
