"""Lines of text from whatever can be read: a file, a pipe or standard input, plain or gzip, once and from its start.

How much is read is bounded while it is unpacked, not afterwards: a few hundred kilobytes of gzip can hold gigabytes.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

from examples.common.files import STDIN, file_mode
from examples.common.text import BLANKS, visible

MB = 1_000_000
LONGEST_LINE = 16 * MB
"""Characters: more than any protein or row of an alignment has."""
MOST_TEXT = 2000
"""Megabytes, unpacked, that are read of ``--data`` and of ``--eval-data`` unless ``--max-text`` says otherwise."""

_GZIP = b"\x1f\x8b"
GROWTH, UNSUSPICIOUS = 200, 32 * MB
"""Gzip can grow a thousandfold; sequences grow by far less, but for small files of repeats."""
_CHUNK = 1 << 20
_MARK = "\xef\xbb\xbf"  # UTF-8's byte order mark as Latin-1 reads it
_PACKED = {
    b"BZh": ("bzip2", "bzcat"),
    b"\xfd7zXZ\x00": ("xz", "xzcat"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstdcat"),
    b"PK\x03\x04": ("zip", "unzip -p"),
}
_WIDE = (b"\xff\xfe", b"\xfe\xff")


class DamagedError(ValueError):
    """What is packed is cut off or damaged; the message says how."""


class TooLargeError(ValueError):
    """There is more than was to be read; the message says how much."""


class UnlikelyError(ValueError):
    """This is no text of sequences, whatever was to be read; the message says why, and what to do if it is."""


def is_readable(path: str | Path) -> bool:
    """Whether there is something to read at ``path``, a file or a stream."""
    mode = file_mode(path)
    return mode is not None and not stat.S_ISDIR(mode)


def lines(path: str | Path, budget: Budget | None = None) -> Iterator[tuple[int, str]]:
    """(number from 1, line without blanks at its ends) in Latin-1, a character a byte: ``text.decoded`` its words.

    Line ends are LF, CR LF or CR. A byte order mark at the beginning of a line, as where files were joined, is left
    out. Gzip is recognised by its first bytes.

    Raises:
        OSError: it cannot be read.
        DamagedError: gzip data that break off or do not fit their checksum.
        TooLargeError: ``budget`` is spent.
        UnlikelyError: a line has more than ``LONGEST_LINE`` characters; gzip data grow more than 200-fold, and beyond
            32 MB; it is packed otherwise, or in UTF-16.
    """
    with opened(path) as raw:
        head = raw.read(6)
        _refuse_others(head)
        counted = _Joined(head, raw)
        joined = io.BufferedReader(cast(io.RawIOBase, counted), _CHUNK)
        packed = head.startswith(_GZIP)
        stream = gzip.GzipFile(fileobj=joined) if packed else joined
        text = io.TextIOWrapper(cast(BinaryIO, stream), encoding="latin-1", newline=None)
        total = 0
        try:
            for number, line in enumerate(iter(partial(text.readline, LONGEST_LINE + 1), ""), start=1):
                total += len(line)
                if len(line) > LONGEST_LINE:
                    raise UnlikelyError(f"a line of more than {LONGEST_LINE / MB:.0f} million characters")
                if packed and total > max(GROWTH * counted.count, UNSUSPICIOUS):
                    grown = f"{counted.count / MB:.1f} MB of gzip data grow to more than {total / MB:.0f} MB"
                    raise UnlikelyError(f"{grown}; if they are what they should be, unpack them with gunzip first")
                if budget is not None:
                    budget.spend(len(line))
                yield number, (line if line.isascii() else line.removeprefix(_MARK)).strip(BLANKS)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DamagedError(f"damaged gzip data ({error})") from error


class Budget:
    """Characters that may still be read, of several files together."""

    def __init__(self, megabytes: float) -> None:
        self.megabytes = megabytes
        self._left = int(megabytes * MB)

    def spend(self, count: int) -> None:
        """Raise TooLargeError when more than allowed was read."""
        self._left -= count
        if self._left < 0:
            raise TooLargeError(f"more than {self.megabytes:g} MB of text, unpacked")


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """The bytes of a file or a stream; ``-`` is standard input, which stays open."""
    standard = str(path) == STDIN
    try:
        file: BinaryIO = open(0 if standard else path, "rb", closefd=not standard)  # noqa: SIM115
    except OSError as error:
        raise OSError(f"cannot read {visible(str(path))} ({error.strerror})") from error
    with file:
        yield file


def kept_copy(path: str | Path, folder: Path, megabytes: float) -> Path:
    """A file of what a stream holds, in ``folder``, named after its content: the same content makes the same file.

    Raises:
        TooLargeError: it is more than so many megabytes as it comes.
        OSError: it cannot be read, or the folder not be written to.
    """
    budget, digest = Budget(megabytes), hashlib.sha256()
    folder.mkdir(parents=True, exist_ok=True)
    with opened(path) as raw, tempfile.NamedTemporaryFile(dir=folder, suffix=".partial", delete=False) as file:
        try:
            while chunk := raw.read(_CHUNK):
                budget.spend(len(chunk))
                digest.update(chunk)
                file.write(chunk)
            file.close()
            kept = folder / f"piped-{digest.hexdigest()[:16]}.sto"
            shutil.move(file.name, kept)
        finally:
            Path(file.name).unlink(missing_ok=True)
    return kept


def _refuse_others(head: bytes) -> None:
    for magic, (name, tool) in _PACKED.items():
        if head.startswith(magic):
            raise UnlikelyError(f"{name} data; plain text and gzip are read, or a pipe: <({tool} FILE)")
    if head.startswith(_WIDE):
        raise UnlikelyError("text in UTF-16; save it in UTF-8, for example with iconv -f UTF-16 -t UTF-8")


class _Joined(io.RawIOBase):
    """Bytes that were read already, and then the rest; ``count`` of them were asked for."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest, self.count = head, rest, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        data = self._head[: len(buffer)] or self._rest.read1(len(buffer))  # type: ignore[attr-defined]
        self._head = self._head[len(buffer) :]
        buffer[: len(data)] = data
        self.count += len(data)
        return len(data)
