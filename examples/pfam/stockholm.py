"""Streamed reader of Stockholm alignments: plain or gzip, one file or a directory, any number of records.

The format is Pfam's (https://en.wikipedia.org/wiki/Stockholm_format): a ``# STOCKHOLM 1.0`` header, ``#=GF`` lines on
the family, ``name  aligned-row`` lines, possibly interleaved in blocks separated by blank lines, and a closing ``//``.
One record is held in memory at a time, so Pfam-A.seed.gz (a few hundred MB unpacked) streams through. Names are UTF-8,
or Latin-1 where they are not that.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from examples.common.files import STDIN
from examples.common.text import clip, decoded, utf8, visible

from .source import (
    LONGEST_LINE,
    MB,
    MOST_TEXT,
    Budget,
    DamagedError,
    TooLargeError,
    UnlikelyError,
    is_readable,
    lines,
)

GAPS = ".-_~"
STOP = "*"
"""A stop codon, in Easel a "nonresidue": it fills a column, and is no residue."""
_ROW_CHARACTERS = frozenset(string.ascii_letters + GAPS + STOP)
_BLANKS = re.compile(r"[ \t\v\f]+")  # no others: a name may hold a no-break space
_EACH_ROW = 100  # bytes that a row takes besides its letters
_LESS = "less (if this is no mistake, --max-text allows more)"
_MARKUP = ("#=GF", "#=GS", "#=GR", "#=GC")
_SUFFIXES = (".sto", ".sth", ".stk", ".stockholm", ".seed", ".full", ".sto.txt", ".seed.txt", ".ali")


class StockholmError(ValueError):
    """A Stockholm file that does not follow the format; the message is ``file:line: what was found; expected what``."""

    def __init__(self, path: Path, line: int, found: str, expected: str) -> None:
        super().__init__(f"{shown(path)}:{line}: {found}; expected {expected}")
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
    size: int = 0


def shown(path: str | Path) -> str:
    """A source's name in messages."""
    return "standard input" if str(path) == STDIN else visible(str(path))


def stockholm_files(path: str | Path) -> list[Path]:
    """The Stockholm files at ``path``: the file or pipe itself, or a directory's files by suffix, in sorted order."""
    if is_readable(path):
        return [Path(path)]
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no Stockholm file or directory at {shown(path)}")
    found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.removesuffix(".gz").endswith(_SUFFIXES))
    if not found:
        raise FileNotFoundError(f"no file ending in {', '.join(_SUFFIXES)} (or the same with .gz) under {shown(path)}")
    return found


def read_stockholm(
    path: str | Path, max_text: float = MOST_TEXT, max_record: float | None = None
) -> Iterator[Alignment]:
    """Yield the records of one file, pipe or directory in order; ``-`` is standard input.

    Args:
        max_text: megabytes of text, unpacked, that are read at most.
        max_record: the same in one record, which is held in memory; an eighth of ``max_text`` by default.

    Raises:
        StockholmError: at the first line that breaks the format or the limit, with file and line number.
        FileNotFoundError: when there is nothing to read.
    """
    budget = Budget(max_text)
    max_record = max_text / 8 if max_record is None else max_record
    for file in stockholm_files(path):
        yield from _records(file, budget, max_record)


def _lines(path: Path, budget: Budget) -> Iterator[tuple[int, str]]:
    """(line number, stripped line, a character a byte)."""
    number = 0
    try:
        for number, line in lines(path, budget):
            yield number, line
    except DamagedError as error:
        raise StockholmError(path, number + 1, str(error), "a complete gzip file") from error
    except TooLargeError as error:
        raise StockholmError(path, number + 1, str(error), _LESS) from error
    except UnlikelyError as error:
        raise StockholmError(path, number + 1, str(error), "a Stockholm file") from error


def _records(path: Path, budget: Budget, max_record: float) -> Iterator[Alignment]:
    record: _Record | None = None
    count = number = 0
    for number, line in _lines(path, budget):
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
            record.size += len(line) + _EACH_ROW
            if record.size > max_record * MB:
                found = f"the record of line {record.start} exceeds {max_record:g} MB"
                raise StockholmError(path, number, found, _LESS) from TooLargeError(found)
    if record is not None:
        raise StockholmError(path, number, f"the file ends inside the record of line {record.start}", "a closing '//'")
    if count == 0:
        raise StockholmError(path, max(number, 1), "no record in the file", "'# STOCKHOLM 1.0'")


def _check_header(path: Path, number: int, line: str) -> None:
    words = _BLANKS.split(line)
    if words[:2] != ["#", "STOCKHOLM"]:
        raise StockholmError(path, number, f"a record starts with {clip(decoded(line))!r}", "'# STOCKHOLM 1.0'")
    if len(words) != 3 or words[2].split(".")[0] != "1":
        raise StockholmError(path, number, f"unknown version in {clip(decoded(line))!r}", "'# STOCKHOLM 1.0'")


def _markup(path: Path, number: int, line: str, record: _Record) -> None:
    if line.startswith("# STOCKHOLM"):
        raise StockholmError(path, number, "a header inside a record", f"'//' to close that of line {record.start}")
    if not line.startswith("#="):
        return  # a comment
    words = [decoded(word) for word in _BLANKS.split(line, maxsplit=2)]
    if words[0] not in _MARKUP:
        raise StockholmError(path, number, f"unknown markup {clip(words[0])!r}", f"one of {', '.join(_MARKUP)}")
    if words[0] != "#=GF" or words[1:2] not in (["ID"], ["AC"], ["SQ"]):
        return
    if len(words) < 3:
        raise StockholmError(path, number, f"'#=GF {words[1]}' without a value", f"'#=GF {words[1]}   value'")
    if words[1] in record.fields:
        raise StockholmError(path, number, f"a second '#=GF {words[1]}' in the record", "one per record")
    if words[1] == "SQ" and not re.fullmatch("[0-9]{1,12}", words[2]):
        raise StockholmError(path, number, f"'#=GF SQ' is {clip(words[2])!r}", "the number of sequences")
    record.fields[words[1]] = words[2].rstrip(";").strip()


def _row(path: Path, number: int, line: str, record: _Record) -> None:
    words = line.split() if line.isprintable() else _BLANKS.split(line)  # the first is faster, and as good then
    if len(words) != 2:
        raise StockholmError(path, number, f"{len(words)} field(s) in {clip(decoded(line))!r}", "'name  aligned-row'")
    name, row = decoded(words[0]), words[1]
    if not _ROW_CHARACTERS.issuperset(row):
        bad = next(c for c in utf8(row) if c not in _ROW_CHARACTERS)
        allowed = f"letters, gaps '{GAPS}' and '{STOP}'"
        raise StockholmError(path, number, f"character {bad!r} in the row of {clip(name)}", allowed)
    if name in record.block:
        # A name comes back: the next block of an interleaved record, if a blank line announced one.
        if not record.blank_before:
            found = f"a second row of {clip(name)} in one block"
            raise StockholmError(path, number, found, "one row per name and block")
        record.block, record.blocks = set(), record.blocks + 1
    record.blank_before = False
    if record.blocks > 1 and name not in record.rows:
        found = f"{clip(name)} appears first in block {record.blocks}"
        raise StockholmError(path, number, found, "the names of block 1")
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
            found = f"the row of {clip(name)} has {len(row)} columns"
            raise StockholmError(path, record.lines[name], found, f"{len(rows[0])} as in {clip(names[0])}")
    if len(rows[0]) > LONGEST_LINE:
        raise StockholmError(path, number, f"{len(rows[0])} columns", f"{LONGEST_LINE} at most")
    announced = record.fields.get("SQ")
    if announced is not None and int(announced) != len(names):
        raise StockholmError(path, number, f"{len(names)} sequences in the record", f"{announced} as '#=GF SQ' says")
    stem = shown(path.name).removesuffix(".gz").split(".")[0] + (f":{record.start}" if record.start > 1 else "")
    source = f"{shown(path)}:{record.start}"
    return Alignment(record.fields.get("ID") or stem, record.fields.get("AC", ""), names, rows, source)
