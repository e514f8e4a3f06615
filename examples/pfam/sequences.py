"""The two proteins to align, from what was given on the command line: FASTA files, or the sequences themselves."""

from __future__ import annotations

import gzip
import io
import os
import re
import string
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from Bio.SeqIO.FastaIO import SimpleFastaParser

from .stockholm import GAPS

_BARE = re.compile(r"[A-Za-z*-]*[A-Za-z][A-Za-z*-]*")
_NUCLEOTIDES = frozenset("ACGTUN")
_FEW = 10  # shorter sequences of nothing but ACGTUN may well be peptides


@dataclass(frozen=True)
class Protein:
    """A name without blanks, the rest of the FASTA header, upper-case letters, and where they came from."""

    name: str
    description: str
    letters: str
    source: str


def read_proteins(arguments: Sequence[str], notes: list[str]) -> tuple[Protein, Protein]:
    """The two proteins of one FASTA file, or of two arguments, each a FASTA file (plain or gzip) or a bare sequence.

    What was changed or looks odd is appended to ``notes``, a line each: gaps and a final stop codon removed, sequences
    beyond those aligned, equal names, letters that look like nucleotides.

    Raises:
        FileNotFoundError: an argument is neither a file nor a sequence.
        ValueError: a file is not FASTA or holds too few sequences, or a sequence is empty or not one of residues.
    """
    if len(arguments) == 1:
        first, second = _read(arguments[0], 2, 1, notes)
    elif len(arguments) == 2:
        (first,), (second,) = (_read(argument, 1, index, notes) for index, argument in enumerate(arguments, start=1))
    else:
        raise ValueError(
            f"{len(arguments)} sequences or files; give two of them, or one FASTA file that holds two sequences"
        )
    if first.name == second.name:
        notes.append(f"both sequences are called {first.name}; they are {first.name}_1 and {first.name}_2 here")
        first, second = (replace(p, name=f"{p.name}_{index}") for index, p in enumerate((first, second), start=1))
    return first, second


def short_name(name: str, width: int = 20) -> str:
    """A name to show: of sp|P69905|HBA_HUMAN the last part, and the ends of what is longer than ``width``."""
    short = next((part for part in reversed(name.split("|")) if part), name)
    if len(short) <= width:
        return short
    tail = (width - 3) // 2
    return f"{short[: width - 3 - tail]}...{short[-tail:]}"


def _read(argument: str, count: int, index: int, notes: list[str]) -> list[Protein]:
    if os.path.isfile(argument):  # not Path's: a bare sequence is too long for a file name, which it would raise on
        return _read_fasta(Path(argument), count, notes)
    if os.path.isdir(argument):
        raise ValueError(f"{argument} is a folder; give a FASTA file or a sequence")
    if not _BARE.fullmatch(argument):
        raise FileNotFoundError(f"{_clip(argument)!r} is neither a file that exists nor a sequence, letters alone")
    if count > 1:
        raise ValueError("one sequence is not enough; give two of them, or one FASTA file that holds two sequences")
    name = f"sequence_{index}"
    return [Protein(name, "", _clean(argument, f"sequence {index}", notes), "command line")]


def _read_fasta(path: Path, count: int, notes: list[str]) -> list[Protein]:
    # Biopython's parser of strings: it skips what stands before the first header, and leaves odd letters to `_clean`.
    records = list(SimpleFastaParser(io.StringIO(_text(path), newline=None)))
    if len(records) < count:
        found = "no sequence" if not records else f"{len(records)} sequence"
        raise ValueError(f"{path} holds {found}; expected FASTA, '>name' and then residues, with {count} or more")
    if len(records) > count:
        taken = "the first" if count == 1 else f"the first {count}"
        notes.append(f"{path} holds {len(records)} sequences; {taken} will be aligned")
    proteins = []
    for number, (title, letters) in enumerate(records[:count], start=1):
        first, *rest = title.split() or [""]
        name = re.sub(r"[^!-~]", "_", first).lstrip("#") or f"{path.name.split('.')[0]}_{number}"
        proteins.append(Protein(name, " ".join(rest), _clean(letters, f"{path}: {name}", notes), str(path)))
    return proteins


def _text(path: Path) -> str:
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip data ({error}); expected a complete gzip file") from error
    return data.decode("utf-8-sig", errors="replace")


def _clean(letters: str, where: str, notes: list[str]) -> str:
    """Upper case, without gaps and the final stop codon."""
    kept = letters.translate({ord(gap): None for gap in GAPS})
    if gaps := len(letters) - len(kept):
        notes.append(f"{where}: {gaps} gap{'s were' if gaps > 1 else ' was'} removed")
    if kept.endswith("*"):
        kept = kept[:-1]
        notes.append(f"{where}: the stop codon '*' at the end was removed")
    if not kept:
        raise ValueError(f"{where} has no residues")
    position = next((index for index, letter in enumerate(kept) if letter not in string.ascii_letters), None)
    if position is not None:
        hint = "; translate one reading frame" if kept[position] == "*" else ""
        raise ValueError(f"{where}: {kept[position]!r} at residue {position + 1} is not an amino acid's letter{hint}")
    kept = kept.upper()
    if len(kept) >= _FEW and set(kept) <= _NUCLEOTIDES:
        notes.append(f"{where} looks like nucleotides, but is read as residues; translate DNA and RNA first")
    return kept


def _clip(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
