"""What the layers of a model did, while a report is being made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

SINKHORN, SOFTMAX, REFUSED = "sinkhorn", "softmax", "refused"

Notes = list[tuple[nn.Module, str, str]]  # module, what it was, why
_NOTES: ContextVar[Notes | None] = ContextVar("_NOTES", default=None)


@contextmanager
def recording() -> Iterator[Notes]:
    """The notes of every call of a registered attention in this thread, until it ends."""
    notes: Notes = []
    token = _NOTES.set(notes)
    try:
        yield notes
    finally:
        _NOTES.reset(token)


def active() -> bool:
    return not torch.compiler.is_compiling() and _NOTES.get() is not None


def note(module: nn.Module, what: str, why: str) -> None:
    if not torch.compiler.is_compiling() and (notes := _NOTES.get()) is not None:
        notes.append((module, what, why))
