"""Many aligned pairs in files that grow as pairs are done, so that a run that was stopped goes on where it was.

Beside the results stands a log. Its first line says what is aligned, and how; each further one, written and synced
after the results that it tells of, says how many pairs are done and how long every file is then. What a crash left
behind the last whole line is cut off. The log is locked, so that two runs do not write into one folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from examples.common.files import lock, prepare_folder

from .library import AlignedPair
from .pair_formats import FORMATS
from .pair_lists import ALL, PairList

LOG = "pairs.log"
_WRITER = "examples.pfam align --pairs"
_LONGEST_LINE = 200_000
_BEGUN = re.compile(rb"\0*|[0-9a-f]{0,8}|[0-9a-f]{8} (\{.*)?")
"""What a crash may leave of a log's first line: nothing that somebody else has written is taken for it."""


def fingerprint(pairs: PairList, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the results depend on, for the log: the proteins, the pairs, the settings."""
    digest = hashlib.sha256()
    for protein in pairs.proteins:
        digest.update(f"{protein.name}\t{protein.letters}\n".encode("utf-8", "surrogatepass"))
    digest.update(ALL.encode() if pairs.listed is None else pairs.listed.tobytes())
    return {"written_by": _WRITER, "input": digest.hexdigest(), "pairs": pairs.total, **settings}


@dataclass
class Results:
    """Open files of results, by their formats.

    ``done`` pairs of ``fingerprint`` are in them.
    """

    folder: Path
    formats: Sequence[str]
    done: int
    _files: dict[str, io.FileIO]
    _log: io.FileIO

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        folder: str | Path,
        formats: Sequence[str],
        about: Mapping[str, Any],
        heads: Mapping[str, str] | None = None,
    ) -> Iterator[Results]:
        """Begin, or go on after what is there.

        Args:
            about: of ``fingerprint``; ``heads``: what a file begins with, where its format's own is not it.

        Raises:
            FileExistsError: what is there is of something else, or was changed; or another run is writing there.
            OSError: it cannot be written.
        """
        prepare_folder(folder)
        folder = Path(folder)
        log, about = folder / LOG, {**about, "formats": list(formats)}
        paths = {name: folder / FORMATS[name].file for name in formats}
        if not log.exists():
            _refuse_others(paths)
        elif not log.is_file():
            raise _not_ours(log)
        with contextlib.ExitStack() as stack:
            try:
                of_log = stack.enter_context(_opened(log))
            except OSError as error:
                raise OSError(f"cannot write to {log} ({error.strerror}); choose another --out") from error
            if not lock(of_log):
                raise FileExistsError(
                    f"another run is writing to --out {folder}; wait for it, or choose another folder"
                )
            done, sizes, end = _read_log(of_log, log, about, paths)
            _cut(of_log, end)
            files: dict[str, io.FileIO] = {}
            results = cls(folder, formats, done, files, of_log)
            with results._kept():
                if sizes is None:
                    results._tell(about)  # first of all: files without it are not ours
                for name, path in paths.items():
                    files[name] = stack.enter_context(_opened(path))
                    _cut(files[name], sizes[name] if sizes else 0)
                    if sizes is None:
                        _write(files[name], (heads or {}).get(name, FORMATS[name].head))
                if sizes is None:
                    results._tell_done(0)
            yield results

    def add(self, found: Sequence[AlignedPair]) -> None:
        """Write some pairs, in every format, and then that they are.

        Raises:
            OSError: they cannot be written, as on a full disk; what was there before is kept.
        """
        with self._kept():
            for name, file in self._files.items():
                _write(file, "".join(FORMATS[name].of(pair) for pair in found))
            self._tell_done(self.done + len(found))
        self.done += len(found)

    @property
    def paths(self) -> list[Path]:
        return [self.folder / FORMATS[name].file for name in self.formats]

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """Say of what cannot be written that what was is kept."""
        try:
            yield
        except OSError as error:
            raise OSError(
                f"cannot write to --out {self.folder} ({error.strerror}); the {self.done} pairs that are there are "
                "kept: make room, and start it again to go on"
            ) from error

    def _tell_done(self, done: int) -> None:
        for file in self._files.values():
            os.fsync(file.fileno())
        self._tell({"done": done, "sizes": {name: file.tell() for name, file in self._files.items()}})

    def _tell(self, values: Mapping[str, Any]) -> None:
        text = json.dumps(values, sort_keys=True)
        _write(self._log, f"{zlib.crc32(text.encode()):08x} {text}\n")
        os.fsync(self._log.fileno())


def _opened(path: Path) -> io.FileIO:
    """The file as it is, made if there is none; unbuffered, so that nothing is left to be written when it is closed."""
    return open(path, "r+b", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666))


def _cut(file: io.FileIO, size: int) -> None:
    """What is written next stands after ``size`` bytes, which is where the file ends."""
    file.truncate(size)
    file.seek(size)


def _write(file: io.FileIO, text: str) -> None:
    left = memoryview(text.encode())
    while left:
        left = left[file.write(left) :]


def _not_ours(log: Path) -> FileExistsError:
    return FileExistsError(f"{log} was not written by this command; choose another --out")


def _refuse_others(paths: Mapping[str, Path]) -> None:
    """Raise FileExistsError if there are results, which no log tells of."""
    for path in paths.values():
        if path.exists():
            raise FileExistsError(f"{path} is there without {LOG}; move it, or choose another --out")


def _read_log(
    file: io.FileIO, log: Path, about: Mapping[str, Any], paths: Mapping[str, Path]
) -> tuple[int, dict[str, int] | None, int]:
    """Pairs done, the files' sizes, None if nothing was begun, and where the log's whole lines end."""
    records, end = _whole_lines(file)
    again = f"choose another --out, or remove {log.parent} to align again"
    if not records:
        file.seek(0)
        if not _BEGUN.fullmatch(file.read(_LONGEST_LINE)):
            raise _not_ours(log)
        _refuse_others(paths)
        return 0, None, 0  # stopped before anything was done
    if records[0] != about:
        was = records[0] if isinstance(records[0], dict) else {}
        if was.get("written_by") != _WRITER:
            raise _not_ours(log)
        differing = [name for name in about if was.get(name) != about[name]]
        same = f"({', '.join(differing)} {'are' if len(differing) > 1 else 'is'} not the same)"
        raise FileExistsError(f"{log.parent} holds other results; {again} {same}")
    if len(records) == 1:
        return 0, None, 0
    done, sizes = records[-1]["done"], records[-1]["sizes"]
    for name, path in paths.items():
        size = path.stat().st_size if path.exists() else -1
        if size < sizes[name]:
            there = "is missing" if size < 0 else f"has {size} bytes where {sizes[name]} were written"
            raise FileExistsError(f"{path} {there}; it was changed since: {again}")
    return done, sizes, end


def _whole_lines(file: io.FileIO) -> tuple[list[Any], int]:
    """The first record and the latest, as far as lines are whole, and where these end."""
    records: list[Any] = []
    end = 0
    buffered = io.BufferedReader(file)
    for line in iter(partial(buffered.readline, _LONGEST_LINE), b""):
        check, _, text = line.partition(b" ")
        if not line.endswith(b"\n") or check != f"{zlib.crc32(text[:-1]):08x}".encode():
            break
        records = [*records[:1], json.loads(text)]  # what is aligned, and the latest
        end += len(line)
    buffered.detach()  # else it would close the file
    return records, end
