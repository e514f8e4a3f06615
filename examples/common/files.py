"""Files that are whole or absent, and the folders of runs."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from examples.common.text import say, visible

CHECKPOINT, REPORT = "checkpoint.pt", "report.txt"
STDIN = "-"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, moved over ``path`` at the end: after a crash or on a full disk the old one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, by ``replacing``."""
    with replacing(path) as file:
        file.write(text.encode())


def lock(file: BinaryIO) -> bool:
    """Hold ``file`` against other processes until it is closed; False if one of them holds it.

    Where the file system has no locks, which is said, nothing is held.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        say(f"note: {file.name} cannot be locked ({error.strerror}): nothing keeps a second run from it", sys.stderr)
    return True


def file_mode(path: str | Path) -> int | None:
    """``st_mode`` of the file, or of standard input for ``-``; None where there is nothing."""
    try:
        return os.fstat(0).st_mode if str(path) == STDIN else os.stat(path).st_mode
    except (OSError, ValueError):  # nothing there, or no name for a file: too long, as sequences are, or with a NUL
        return None


def is_stream(path: str | Path) -> bool:
    """Whether ``path`` can be read, but only once: standard input, even of a file, a pipe, a terminal, a device."""
    mode = file_mode(path)
    return mode is not None and not stat.S_ISDIR(mode) and (str(path) == STDIN or not stat.S_ISREG(mode))


def read_file(path: Path) -> Any:
    """What torch.save put into a file, tensors and plain containers alone.

    Raises:
        FileNotFoundError: no file there.
        ValueError: the file is not readable as that.
    """
    if not os.path.isfile(path):  # a name that no file system takes is none either
        pipe = ": it is a pipe, and a checkpoint must be a file" if is_stream(path) else ""
        raise FileNotFoundError(f"no checkpoint at {visible(str(path))}{pipe}")
    import torch  # which most of this module's users do without

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen unrelated types on damaged files
        raise ValueError(f"{visible(str(path))} is not a readable checkpoint; it is damaged, or not one") from error


def prepare_folder(folder: str | Path, option: str = "--out") -> None:
    """Make a run's folder and write to it once: better to fail before the training than after it.

    Raises:
        ValueError: its name is empty.
        OSError: it cannot be made or written to; the message names ``option``.
    """
    if not str(folder):
        raise ValueError(f"{option} is empty; name a folder")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {option} {folder} ({error.strerror}); choose another folder") from error


def set_aside(folder: str | Path) -> Path | None:
    """Rename the folder of an earlier run to a free name, and say so; None if there is none. A new run loses nothing.

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
    say(f"the earlier run in {folder} is now in {aside}")
    return aside
