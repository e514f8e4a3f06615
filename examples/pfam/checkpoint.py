"""Checkpoints: written atomically, resumed exactly."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.common.files import CHECKPOINT, read_file, replacing
from examples.common.text import clip, one_line, visible


def save_checkpoint(folder: str | Path, state: dict[str, Any]) -> Path:
    """Write ``state`` and the random number generators' states to ``folder/checkpoint.pt``.

    After a crash or on a full disk the previous checkpoint is whole.
    """
    path = Path(folder) / CHECKPOINT
    with replacing(path) as file:
        torch.save({**state, "rng": _rng_state()}, file)
    return path


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint from its file or its folder; nothing in it is executed (``weights_only``).

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: the file is not a checkpoint of this example.
    """
    path = Path(path)
    path = path / CHECKPOINT if os.path.isdir(path) else path
    state = read_file(path)
    missing = {"config", "model", "optimizer", "step", "history", "rng"} - set(state if isinstance(state, dict) else ())
    if missing:
        raise ValueError(f"{path} is not a checkpoint of this example: it lacks {', '.join(sorted(missing))}")
    return dict(state)


@contextlib.contextmanager
def restoring(path: str | Path) -> Iterator[None]:
    """Within it, whatever goes wrong is the content of the checkpoint at ``path``: a ValueError that says so."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"is damaged, or of another version ({clip(one_line(error), 200)})"
        raise ValueError(f"the checkpoint in {visible(str(path))} {reason}") from error


def restore_rng(state: dict[str, Any]) -> None:
    """Put torch's, NumPy's and Python's global generators back to where they were at the save."""
    torch.set_rng_state(state["torch"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _rng_state() -> dict[str, Any]:
    # Plain lists and numbers: anything richer would need pickled classes, which weights_only refuses to load.
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy": [str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss],
    }
