"""Checkpoints: written atomically, resumed exactly."""

from __future__ import annotations

import contextlib
import errno
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .atomic import replacing
from .source import is_stream
from .text import clip, one_line, visible

CHECKPOINT, REPORT = "checkpoint.pt", "report.txt"


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
    path = path / CHECKPOINT if path.is_dir() else path
    state = read_file(path)
    missing = {"config", "model", "optimizer", "step", "history", "rng"} - set(state if isinstance(state, dict) else ())
    if missing:
        raise ValueError(f"{path} is not a checkpoint of this example: it lacks {', '.join(sorted(missing))}")
    return dict(state)


def read_file(path: Path) -> Any:
    """What torch.save put into a file, tensors and plain containers alone.

    Raises:
        FileNotFoundError: no file there.
        ValueError: the file is not readable as that.
    """
    if not path.is_file():
        pipe = ": it is a pipe, and a checkpoint must be a file" if is_stream(path) else ""
        raise FileNotFoundError(f"no checkpoint at {visible(str(path))}{pipe}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen unrelated types on damaged files
        raise ValueError(f"{visible(str(path))} is not a readable checkpoint; it is damaged, or not one") from error


@contextlib.contextmanager
def restoring(path: str | Path) -> Iterator[None]:
    """Within it, whatever goes wrong is the content of the checkpoint at ``path``: a ValueError that says so."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"is damaged, or of another version ({clip(one_line(error), 200)})"
        raise ValueError(f"the checkpoint in {visible(str(path))} {reason}") from error


def prepare_folder(folder: str | Path, option: str = "--out") -> None:
    """Make a run's folder and write to it once: better to fail before the training than after it.

    Raises:
        OSError: it cannot be made or written to; the message names ``option``.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {option} {folder} ({error.strerror}); choose another folder") from error


def set_aside(folder: str | Path) -> Path | None:
    """Rename the folder of an earlier run to a free name, so that a new run there loses nothing; None if there is none.

    Raises:
        OSError: it cannot be renamed; the message names ``--out``.
    """
    folder = Path(folder)
    if not any((folder / name).exists() for name in (CHECKPOINT, REPORT)):
        return None
    number = 1
    try:
        if Path.cwd().is_relative_to(folder.resolve()):
            raise OSError(errno.EBUSY, "it is the current folder")
        while (aside := folder.with_name(f"{folder.name}-{number}")).exists():
            number += 1
        folder.rename(aside)
    except OSError as error:
        reason = f"--out {folder} holds an earlier run and cannot be renamed ({error.strerror})"
        raise OSError(f"{reason}; choose another folder") from error
    folder.mkdir()
    return aside


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
