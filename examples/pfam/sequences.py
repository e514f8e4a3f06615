"""The two proteins to align, from what was given on the command line: FASTA files, or the sequences themselves."""

from __future__ import annotations

import os
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from Bio.SeqIO.FastaIO import SimpleFastaParser

from examples.common.files import is_stream
from examples.common.text import BLANKS, clip, utf8, visible

from .pairs import encode, looks_like_nucleotides, residue_counts
from .source import MB, DamagedError, TooLargeError, UnlikelyError, is_readable, lines
from .stockholm import GAPS, STOP, shown

MOST_PAIRS = 9_000_000
"""Pairs of residues of two sequences, unless told otherwise: memory is some 80 bytes each."""
LONGEST = 100_000
"""Residues of a sequence: more than any known protein has, and half a gigabyte whatever it is aligned with."""
TOO_LONG = f"more than {LONGEST} residues, more than any known protein has; cut it, for example into domains"
_BARE = re.compile(r"[A-Za-z*-]*[A-Za-z][A-Za-z*-]*")
_LOOK_ON = 64 * MB
"""Characters that are read beyond the sequences that are aligned, to say how many there are."""


@dataclass(frozen=True)
class Protein:
    """A name without blanks, the rest of the FASTA header, upper-case letters, and where they came from.

    Name and description are ``text.visible``; the name is not what other formats take for something else.
    """

    name: str
    description: str
    letters: str
    source: str


def read_proteins(arguments: Sequence[str], notes: list[str], longest: int = LONGEST) -> tuple[Protein, Protein]:
    """The two proteins of one FASTA file, or of two arguments, each a FASTA file (plain or gzip) or a bare sequence.

    A pipe is as good as a file, and ``-`` is standard input. A sequence of more than ``longest`` residues is refused
    while it is read.

    What was changed or looks odd is appended to ``notes``, a line each: gaps and a final stop codon removed, sequences
    beyond those aligned, equal names, letters that look like nucleotides.

    Raises:
        FileNotFoundError: an argument is neither a file nor a sequence.
        ValueError: a file is not FASTA or holds too few sequences, or a sequence is empty, too long or not one of
            residues.
    """
    if len(arguments) == 1:
        first, second = _read(arguments[0], 2, 1, notes, longest)
    elif len(arguments) == 2:
        if arguments[0] == arguments[1] and is_stream(arguments[0]):
            raise ValueError(f"{shown(arguments[0])} can be read only once; give it once, with both sequences in it")
        first, second = (
            _read(argument, 1, index, notes, longest)[0] for index, argument in enumerate(arguments, start=1)
        )
    else:
        raise ValueError(
            f"{len(arguments)} sequences or files; give two of them, or one FASTA file that holds two sequences"
        )
    if first.name == second.name:
        notes.append(f"both sequences are called {first.name}; they are {first.name}_1 and {first.name}_2 here")
        first, second = (replace(p, name=f"{p.name}_{index}") for index, p in enumerate((first, second), start=1))
    return first, second


def read_many(arguments: Sequence[str], notes: list[str], longest: int = LONGEST) -> list[Protein]:
    """All proteins of some FASTA files, plain or gzip, pipes too, in order; bare sequences count as files of one.

    Names are made different: the second "a" is a_2. What was changed or looks odd is appended to ``notes``.

    Raises:
        FileNotFoundError: an argument is neither a file nor a sequence.
        ValueError: a file is not FASTA or holds no sequence, or a sequence is empty, too long or not one of residues.
    """
    streams = [argument for argument in arguments if is_stream(argument)]
    if len(set(streams)) < len(streams):
        raise ValueError(f"{shown(streams[0])} can be read only once; give it once")
    proteins: list[Protein] = []
    for index, argument in enumerate(arguments, start=1):
        proteins += _read(argument, None, index, notes, longest)
    taken: set[str] = {protein.name for protein in proteins}
    seen: set[str] = set()
    for index, protein in enumerate(proteins):
        name, number = protein.name, 2
        if name in seen:
            while (name := f"{protein.name}_{number}") in taken:
                number += 1
            notes.append(f"another sequence is called {clip(protein.name)}; that of {shown(protein.source)} is {name}")
            proteins[index] = replace(protein, name=name)
        taken.add(name)
        seen.add(name)
    return proteins


def count_of_pairs(pairs: int) -> str:
    """A number of pairs of residues in words: in millions from a hundred thousand on."""
    if pairs < 100_000:
        return str(pairs)
    return f"{pairs / 1e6:.4g} million" if pairs < 10**10 else f"{pairs / 1e6:.0f} million"


def short_name(name: str, width: int = 20) -> str:
    """A name to show: of sp|P69905|HBA_HUMAN the last part, and the ends of what is longer than ``width``."""
    short = next((part for part in reversed(name.split("|")) if part), name)
    if len(short) <= width:
        return short
    tail = (width - 3) // 2
    return f"{short[: width - 3 - tail]}...{short[-tail:]}"


def _read(argument: str, count: int | None, index: int, notes: list[str], longest: int) -> list[Protein]:
    if is_readable(argument):
        return _read_fasta(argument, count, notes, longest)
    if os.path.isdir(argument):
        raise ValueError(f"{shown(argument)} is a folder; give a FASTA file or a sequence")
    if not _BARE.fullmatch(argument):
        raise FileNotFoundError(f"{clip(argument, 60)!r} is neither a file that exists nor a sequence, letters alone")
    if count is not None and count > 1:
        raise ValueError("one sequence is not enough; give two of them, or one FASTA file that holds two sequences")
    if len(argument) > longest:
        raise ValueError(f"sequence {index} has {TOO_LONG}")
    name = f"sequence_{index}"
    return [Protein(name, "", clean_letters(argument, f"sequence {index}", notes), "command line")]


def _read_fasta(path: str, count: int | None, notes: list[str], longest: int) -> list[Protein]:
    """The first ``count`` of a file, or all."""
    found, wanted = _Found(), count or 1
    # Biopython's parser of strings: it skips what stands before the first header, and leaves odd letters
    # to `clean_letters`.
    records: list[tuple[str, str]] = []
    try:
        for record in SimpleFastaParser(_bounded(path, count, longest, found)):
            if count is None or len(records) < count:
                records.append(record)
    except DamagedError as error:
        raise ValueError(f"{shown(path)}: {error}; expected a complete gzip file") from error
    except (TooLargeError, UnlikelyError) as error:
        raise ValueError(f"{shown(path)}: {error}; expected FASTA, with proteins") from error
    if len(records) < wanted:
        held = "no sequence" if not records else f"{len(records)} sequence"
        expected = f"FASTA, '>name' and then residues, with {wanted} or more"
        raise ValueError(f"{shown(path)} holds {held}; expected {expected}")
    if count is not None and found.headers > count:
        taken = "the first" if count == 1 else f"the first {count}"
        more = "" if found.all else " or more"
        notes.append(f"{shown(path)} holds {found.headers}{more} sequences; {taken} will be aligned")
    proteins = []
    for number, (title, letters) in enumerate(records, start=1):
        first, *rest = re.split(f"[{BLANKS}]+", title.strip(BLANKS))
        name = plain_name(first) or f"{plain_name(Path(path).name.split('.')[0])}_{number}"
        where = f"{shown(path)}: {clip(name)}"
        proteins.append(Protein(name, visible(" ".join(rest)), clean_letters(letters, where, notes), path))
    return proteins


@dataclass
class _Found:
    """Headers of a file that were counted, and whether those are all."""

    headers: int = 0
    all: bool = True


def _bounded(path: str, count: int | None, longest: int, found: _Found) -> Iterator[str]:
    """The lines of a FASTA file, as far as they are wanted."""
    letters = looked = 0
    for _, raw in lines(path):
        line = utf8(raw)
        if line.startswith(">"):
            found.headers, letters = found.headers + 1, 0
        else:
            letters += len(line)
        if count is not None and found.headers > count:
            looked += len(line)
            if looked > _LOOK_ON:
                found.all = False
                return
            line = line[:1]  # it is only counted
        elif letters > longest:
            what = f"in sequence {found.headers}" if found.headers else "before the first '>'"
            raise TooLargeError(f"more than {longest} letters {what}, more than any known protein has; cut it")
        yield line + "\n"


def plain_name(name: str) -> str:
    """As a name in FASTA, Stockholm and tables: '_' for blanks and what is not to be seen, no comment, no end."""
    seen = "".join(c if c.isprintable() and not c.isspace() else "_" for c in name)
    return re.sub("^(#|//)+", "", seen)


def clean_letters(letters: str, where: str, notes: list[str] | None = None) -> str:
    """Upper case, without gaps and the final stop codon; what was changed or looks odd is appended to ``notes``.

    Raises:
        ValueError: there is no residue, or what is none; the message begins with ``where``.
    """
    notes = [] if notes is None else notes
    kept = letters.translate({ord(gap): None for gap in GAPS})
    if gaps := len(letters) - len(kept):
        notes.append(f"{where}: {gaps} gap{'s were' if gaps > 1 else ' was'} removed")
    if kept.endswith(STOP):
        kept = kept[:-1]
        notes.append(f"{where}: the stop codon '*' at the end was removed")
    if not kept:
        raise ValueError(f"{where} has no residues")
    position = next((index for index, letter in enumerate(kept) if letter not in string.ascii_letters), None)
    if position is not None:
        hint = "; translate one reading frame" if kept[position] == STOP else ""
        raise ValueError(f"{where}: {kept[position]!r} at residue {position + 1} is not an amino acid's letter{hint}")
    kept = kept.upper()
    if looks_like_nucleotides(residue_counts(encode(kept))):
        notes.append(f"{where} looks like nucleotides, but is read as residues; translate DNA and RNA first")
    return kept
