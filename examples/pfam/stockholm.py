"""Streamed reader of Stockholm alignments: plain or gzip, one file or a directory, any number of records.

The format is Pfam's (https://en.wikipedia.org/wiki/Stockholm_format): a ``# STOCKHOLM 1.0`` header, ``#=GF`` lines on
the family, ``name  aligned-row`` lines, possibly interleaved in blocks separated by blank lines, and a closing ``//``.
One record is held in memory at a time, so Pfam-A.seed.gz (a few hundred MB unpacked) streams through.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

GAPS = ".-_~"
_ROW_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz" + GAPS)
_MARKUP = ("#=GF", "#=GS", "#=GR", "#=GC")
_SUFFIXES = (".sto", ".sth", ".stk", ".stockholm", ".seed", ".full", ".sto.txt", ".seed.txt", ".ali")


class StockholmError(ValueError):
    """A Stockholm file that does not follow the format; the message is ``file:line: what was found; expected what``."""

    def __init__(self, path: Path, line: int, found: str, expected: str) -> None:
        super().__init__(f"{path}:{line}: {found}; expected {expected}")
        self.path, self.line, self.found, self.expected = path, line, found, expected


@dataclass(frozen=True)
class Alignment:
    """One record: ``rows[k]`` is the aligned row of ``names[k]``; every row has the same number of columns."""

    name: str
    accession: str
    names: tuple[str, ...]
    rows: tuple[str, ...]
    source: str


@dataclass
class _Record:
    start: int
    fields: dict[str, str] = field(default_factory=dict)
    rows: dict[str, list[str]] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    block: set[str] = field(default_factory=set)
    blocks: int = 1
    blank_before: bool = False


def stockholm_files(path: str | Path) -> list[Path]:
    """The Stockholm files at ``path``: the file itself, or a directory's files by suffix, in sorted order."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no Stockholm file or directory at {path}")
    found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.removesuffix(".gz").endswith(_SUFFIXES))
    if not found:
        raise FileNotFoundError(f"no file ending in {', '.join(_SUFFIXES)} (or the same with .gz) under {path}")
    return found


def read_stockholm(path: str | Path) -> Iterator[Alignment]:
    """Yield the records of one file or directory in order.

    Raises:
        StockholmError: at the first line that breaks the format, with file and line number.
        FileNotFoundError: when there is nothing to read.
    """
    for file in stockholm_files(path):
        with open(file, "rb") as raw:
            yield from _records(file, raw)


def _lines(path: Path, raw: BinaryIO) -> Iterator[tuple[int, str]]:
    """(line number, stripped text); gzip is recognised by its magic bytes, not by the file's name."""
    magic = raw.read(2)
    raw.seek(0)
    number = 0
    try:
        stream = gzip.GzipFile(fileobj=raw) if magic == b"\x1f\x8b" else raw
        for number, line in enumerate(stream, start=1):
            # Author names in Pfam mix encodings; rows are ASCII and are checked character by character below.
            yield number, line.decode("latin-1").strip()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise StockholmError(path, number + 1, f"damaged gzip data ({error})", "a complete gzip file") from error


def _records(path: Path, raw: BinaryIO) -> Iterator[Alignment]:
    record: _Record | None = None
    count = number = 0
    for number, line in _lines(path, raw):
        if record is None:
            if line:
                _check_header(path, number, line)
                record = _Record(number)
        elif line == "//":
            yield _finish(path, number, record)
            record, count = None, count + 1
        elif not line:
            record.blank_before = True
        elif line.startswith("#"):
            _markup(path, number, line, record)
        else:
            _row(path, number, line, record)
    if record is not None:
        raise StockholmError(path, number, f"the file ends inside the record of line {record.start}", "a closing '//'")
    if count == 0:
        raise StockholmError(path, max(number, 1), "no record in the file", "'# STOCKHOLM 1.0'")


def _check_header(path: Path, number: int, line: str) -> None:
    words = line.split()
    if words[:2] != ["#", "STOCKHOLM"]:
        raise StockholmError(path, number, f"a record starts with {_clip(line)!r}", "'# STOCKHOLM 1.0'")
    if len(words) != 3 or words[2].split(".")[0] != "1":
        raise StockholmError(path, number, f"unknown version in {_clip(line)!r}", "'# STOCKHOLM 1.0'")


def _markup(path: Path, number: int, line: str, record: _Record) -> None:
    if line.startswith("# STOCKHOLM"):
        raise StockholmError(path, number, "a header inside a record", f"'//' to close that of line {record.start}")
    if not line.startswith("#="):
        return  # a comment
    words = line.split(None, 2)
    if words[0] not in _MARKUP:
        raise StockholmError(path, number, f"unknown markup {_clip(words[0])!r}", f"one of {', '.join(_MARKUP)}")
    if words[0] != "#=GF" or words[1:2] not in (["ID"], ["AC"], ["SQ"]):
        return
    if len(words) < 3:
        raise StockholmError(path, number, f"'#=GF {words[1]}' without a value", f"'#=GF {words[1]}   value'")
    if words[1] in record.fields:
        raise StockholmError(path, number, f"a second '#=GF {words[1]}' in the record", "one per record")
    if words[1] == "SQ" and not words[2].isdigit():
        raise StockholmError(path, number, f"'#=GF SQ' is {_clip(words[2])!r}", "the number of sequences")
    record.fields[words[1]] = words[2].rstrip(";").strip()


def _row(path: Path, number: int, line: str, record: _Record) -> None:
    words = line.split()
    if len(words) != 2:
        raise StockholmError(path, number, f"{len(words)} field(s) in {_clip(line)!r}", "'name  aligned-row'")
    name, row = words
    if not _ROW_CHARACTERS.issuperset(row):
        bad = next(c for c in row if c not in _ROW_CHARACTERS)
        raise StockholmError(path, number, f"character {bad!r} in the row of {name}", f"letters and gaps '{GAPS}'")
    if name in record.block:
        # A name comes back: the next block of an interleaved record, if a blank line announced one.
        if not record.blank_before:
            raise StockholmError(path, number, f"a second row of {name} in one block", "one row per name and block")
        record.block, record.blocks = set(), record.blocks + 1
    record.blank_before = False
    if record.blocks > 1 and name not in record.rows:
        raise StockholmError(path, number, f"{name} appears first in block {record.blocks}", "the names of block 1")
    record.block.add(name)
    record.rows.setdefault(name, []).append(row)
    record.lines[name] = number


def _finish(path: Path, number: int, record: _Record) -> Alignment:
    if not record.rows:
        raise StockholmError(path, number, "a record without sequences", "at least one 'name  aligned-row' line")
    names = tuple(record.rows)
    rows = tuple("".join(parts) for parts in record.rows.values())
    for name, row in zip(names, rows, strict=True):
        if len(row) != len(rows[0]):
            found = f"the row of {name} has {len(row)} columns"
            raise StockholmError(path, record.lines[name], found, f"{len(rows[0])} as in {names[0]}")
    announced = record.fields.get("SQ")
    if announced is not None and int(announced) != len(names):
        raise StockholmError(path, number, f"{len(names)} sequences in the record", f"{announced} as '#=GF SQ' says")
    stem = path.name.removesuffix(".gz").split(".")[0] + (f":{record.start}" if record.start > 1 else "")
    return Alignment(record.fields.get("ID", stem), record.fields.get("AC", ""), names, rows, f"{path}:{record.start}")


def _clip(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
