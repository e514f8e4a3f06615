"""Many aligned pairs in files that grow as pairs are done, so that a run that was stopped goes on where it was.

Beside the results stands a log. Its first line says what is aligned, and how; each further one, written and synced
after the results that it tells of, says how many pairs are done and how long every file is then. What a crash left
behind the last whole line is cut off.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from examples.common.files import prepare_folder

from .library import AlignedPair
from .pair_formats import FORMATS
from .pair_lists import ALL, PairList

LOG = "pairs.log"
_WRITER = "examples.pfam align --pairs"


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
    _files: dict[str, BinaryIO]
    _log: BinaryIO

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
            FileExistsError: what is there is of something else, or was changed.
            OSError: it cannot be written.
        """
        folder = Path(folder)
        prepare_folder(folder)
        log, about = folder / LOG, {**about, "formats": list(formats)}
        paths = {name: folder / FORMATS[name].file for name in formats}
        ours, done, sizes, end = _read_log(log, about, paths) if log.exists() else (False, 0, None, 0)
        if not ours:
            for path in paths.values():
                if path.exists():
                    raise FileExistsError(f"{path} is there without {LOG}; move it, or choose another --out")
        with contextlib.ExitStack() as stack:
            files: dict[str, BinaryIO] = {}
            results = cls(folder, formats, done, files, stack.enter_context(_cut(log, end)))
            if sizes is None:
                results._tell(about)  # first of all: files without it are not ours
            for name, path in paths.items():
                files[name] = stack.enter_context(_cut(path, sizes[name] if sizes else 0))
                if sizes is None:
                    files[name].write((heads or {}).get(name, FORMATS[name].head).encode())
            if sizes is None:
                results._tell_done()
            yield results

    def add(self, found: Sequence[AlignedPair]) -> None:
        """Write some pairs, in every format, and then that they are."""
        for name, file in self._files.items():
            file.write("".join(FORMATS[name].of(pair) for pair in found).encode())
        self.done += len(found)
        self._tell_done()

    @property
    def paths(self) -> list[Path]:
        return [self.folder / FORMATS[name].file for name in self.formats]

    def _tell_done(self) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self._tell({"done": self.done, "sizes": {name: file.tell() for name, file in self._files.items()}})

    def _tell(self, values: Mapping[str, Any]) -> None:
        text = json.dumps(values, sort_keys=True)
        self._log.write(f"{zlib.crc32(text.encode()):08x} {text}\n".encode())
        self._log.flush()
        os.fsync(self._log.fileno())


def _cut(path: Path, size: int) -> BinaryIO:
    """The file, open to be written after ``size`` bytes, which is where it ends."""
    file = open(path, "r+b" if size else "wb")  # noqa: SIM115
    file.truncate(size)
    file.seek(size)
    return file


def _read_log(
    log: Path, about: Mapping[str, Any], paths: Mapping[str, Path]
) -> tuple[bool, int, dict[str, int] | None, int]:
    """Whether it is of these results; pairs done, the files' sizes, and where the log's whole lines end."""
    records, end = _whole_lines(log)
    other = f"{log.parent} holds other results; choose another --out, or remove it to align again"
    if not records:
        if log.stat().st_size > 200_000:
            raise FileExistsError(f"{log} was not written by this command; choose another --out")
        return False, 0, None, 0  # stopped before anything was done
    if records[0] != about:
        was = records[0] if isinstance(records[0], dict) else {}
        if was.get("written_by") != _WRITER:
            raise FileExistsError(f"{log} was not written by this command; choose another --out")
        differing = [name for name in about if was.get(name) != about[name]]
        raise FileExistsError(f"{other} ({', '.join(differing)} {'are' if len(differing) > 1 else 'is'} not the same)")
    if len(records) == 1:
        return True, 0, None, 0
    done, sizes = records[-1]["done"], records[-1]["sizes"]
    for name, path in paths.items():
        size = path.stat().st_size if path.exists() else -1
        if size < sizes[name]:
            there = "is missing" if size < 0 else f"has {size} bytes where {sizes[name]} were written"
            raise FileExistsError(f"{path} {there}; {other}")
    return True, done, sizes, end


def _whole_lines(log: Path) -> tuple[list[Any], int]:
    records: list[Any] = []
    end = 0
    with open(log, "rb") as file:
        for line in file:
            check, _, text = line.partition(b" ")
            if not line.endswith(b"\n") or check != f"{zlib.crc32(text[:-1]):08x}".encode():
                break
            record = json.loads(text)
            records = [*records[:1], record]  # what is aligned, and the latest
            end += len(line)
    return records, end
