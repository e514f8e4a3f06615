"""The aligners that biologists have installed, each asked for one pair at a time, in a process of its own.

What is found on the PATH is asked for its version once, and then runs as its manual recommends for accuracy, on one
thread, in an empty folder that is removed again, with a time limit after which it is killed with all it started. What
it writes must be the two sequences in columns; anything else is an error that says so.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from Bio.SeqIO.FastaIO import SimpleFastaParser

from examples.common.text import clip, visible

from .pairs import Pair, decode
from .stockholm import GAPS

IntArray = npt.NDArray[np.int64]

TIMEOUT = 60.0
"""Seconds that a program may take over a pair, unless told otherwise."""
_ASKING = 20.0
_INPUT, _OUTPUT = "pair.fasta", "aligned.fasta"
_NAMES = ("a", "b")
_SPARE = 1_000_000  # bytes that a program may write beyond ten times the sequences


class ProgramError(RuntimeError):
    """A program did not run, took too long, or wrote something else than the alignment of its two sequences."""


@dataclass(frozen=True)
class Program:
    """How an aligner is called.

    Attributes:
        name: of its row.
        command: its executable's name.
        arguments: for a pair in ``pair.fasta``.
        writes: whether it writes to ``aligned.fasta``, not to standard output.
        version: arguments that make it say its version.
        needs: what the version must start with.
    """

    name: str
    command: str
    arguments: tuple[str, ...]
    writes: bool = False
    version: tuple[str, ...] = ("--version",)
    needs: str = ""


_MAFFT = ("--quiet", "--amino", "--thread", "1", "--maxiterate", "1000")
PROGRAMS: dict[str, Program] = {
    "probalign": Program("Probalign", "probalign", (_INPUT,), version=()),
    "probcons": Program("ProbCons", "probcons", (_INPUT,), version=()),
    "muscle": Program(
        "MUSCLE 5", "muscle", ("-align", _INPUT, "-output", _OUTPUT, "-threads", "1"), True, ("-version",), "5."
    ),
    "clustalo": Program(
        "Clustal Omega", "clustalo", ("-i", _INPUT, "--seqtype=Protein", "--threads=1", "--outfmt=fa"), False
    ),
    "mafft-linsi": Program("MAFFT L-INS-i", "mafft", (*_MAFFT, "--localpair", _INPUT)),
    "mafft-ginsi": Program("MAFFT G-INS-i", "mafft", (*_MAFFT, "--globalpair", _INPUT)),
    "kalign": Program("Kalign", "kalign", ("--type", "protein", "-n", "1", "-i", _INPUT, "-o", _OUTPUT), True),
}
"""By the names that ``--programs`` takes."""


@dataclass(frozen=True)
class Installed:
    """A program that was found: where, and the version that it says it has, or "unknown"."""

    program: Program
    path: str
    version: str

    @property
    def label(self) -> str:
        return f"{self.program.name} ({self.version})"

    def align(self, pair: Pair, timeout: float = TIMEOUT) -> IntArray:
        """The residue pairs [p, 2] of ``pair``: the columns that hold two residues.

        Raises:
            ProgramError: see there.
        """
        letters = (decode(pair.query), decode(pair.key))
        with tempfile.TemporaryDirectory(prefix="pfam-program-", ignore_cleanup_errors=True) as folder:
            text = "".join(f">{name}\n{row}\n" for name, row in zip(_NAMES, letters, strict=True))
            (Path(folder) / _INPUT).write_text(text, encoding="ascii")
            printed = _run(self.path, self.program.arguments, folder, timeout)
            path = Path(folder) / _OUTPUT if self.program.writes else printed
            return _columns(path, letters)


def find(names: Sequence[str] | None = None) -> tuple[list[Installed], list[str]]:
    """The programs that are installed, of all ``PROGRAMS`` or of ``names``, and notes on those that are not used.

    Raises:
        ValueError: one of ``names`` is not in ``PROGRAMS``, or is not installed.
    """
    for name in names or ():
        if name not in PROGRAMS:
            raise ValueError(f"--programs: {clip(visible(name))!r} is none of {', '.join(PROGRAMS)}")
    found, notes, absent = [], [], []
    for name in dict.fromkeys(names if names is not None else PROGRAMS):
        program = PROGRAMS[name]
        path = shutil.which(program.command)
        if path is None:
            if names is not None:
                raise ValueError(f"--programs: {program.name} is not installed: no {program.command} on the PATH")
            absent.append(program.name)
            continue
        try:
            version = _version(program, path)
        except ProgramError as error:
            notes.append(f"{program.name} is left out: {visible(path)} {error}")
            continue
        if not version.startswith(program.needs):
            notes.append(f"{program.name} is left out: {visible(path)} says version {version}")
            continue
        found.append(Installed(program, path, version))
    if absent:
        notes.append(f"not installed, so not compared: {', '.join(absent)}")
    return found, notes


def _version(program: Program, path: str) -> str:
    """What stands in what it prints, whatever its exit status: several print their help."""
    with tempfile.TemporaryDirectory(prefix="pfam-program-", ignore_cleanup_errors=True) as folder:
        printed = _run(path, program.version, folder, _ASKING, check=False)
        text = b"".join(file.read_bytes()[:10_000] for file in (printed, printed.with_suffix(".errors")))
    match = re.search(rb"(?i)(?:version |\bv?)(\d{1,4}(?:\.\w{1,12}){1,3})", text)
    return match[1].decode() if match else "unknown"


def _run(path: str, arguments: Sequence[str], folder: str, timeout: float, check: bool = True) -> Path:
    """Run it in the folder; where its output is, with what it printed as errors beside it."""
    out = Path(folder) / "printed"
    environment = {**os.environ, "TMPDIR": folder, "LC_ALL": "C", "OMP_NUM_THREADS": "1", "MAFFT_TMPDIR": folder}
    with open(out, "wb") as output, open(out.with_suffix(".errors"), "wb") as errors:
        try:
            process = subprocess.Popen(
                [path, *arguments],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,  # it may be a script: what that started is killed with it
            )
        except OSError as error:
            raise ProgramError(f"cannot be started ({error.strerror or error})") from error
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise ProgramError(f"took more than {timeout:g} s and was stopped") from error
        finally:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if check and status:
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        raise ProgramError(f"{how}{_last_words(out.with_suffix('.errors'))}")
    return out


def _last_words(path: Path) -> str:
    lines = path.read_bytes()[-2000:].decode("utf-8", "replace").strip().splitlines()
    return f": {clip(visible(lines[-1].strip()), 200)}" if lines else ""


def _columns(path: Path, letters: tuple[str, str]) -> IntArray:
    try:
        if path.stat().st_size > 10 * sum(map(len, letters)) + _SPARE:
            raise ProgramError(f"wrote {path.stat().st_size} bytes, which is no alignment of two sequences")
        with open(path, encoding="ascii", errors="replace") as file:
            rows = dict(SimpleFastaParser(file))
    except FileNotFoundError as error:
        raise ProgramError("wrote no alignment") from error
    rows = {title.split()[0] if title.split() else "": row for title, row in rows.items()}
    if set(rows) != set(_NAMES):
        raise ProgramError(f"wrote {len(rows)} sequences, not the two that it was given")
    aligned = [rows[name] for name in _NAMES]
    real = []
    for row, given in zip(aligned, letters, strict=True):
        if row.translate({ord(gap): None for gap in GAPS}).upper() != given:
            raise ProgramError("wrote sequences other than those that it was given")
        real.append(np.array([letter not in GAPS for letter in row]))
    if len(real[0]) != len(real[1]):
        raise ProgramError(f"wrote rows of {len(real[0])} and {len(real[1])} columns")
    both = real[0] & real[1]
    return np.stack([np.cumsum(row)[both] - 1 for row in real], axis=1).astype(np.int64)


@dataclass(frozen=True)
class Failures:
    """How often a program failed, and the first time in words."""

    count: int
    first: str


MOST_FAILURES = 5
"""After so many a program is not asked any more, and left out of the tables."""


def align_all(
    installed: Installed, pairs: Sequence[Pair], timeout: float = TIMEOUT, after: Callable[[], object] = lambda: None
) -> tuple[list[IntArray] | None, Failures]:
    """Residue pairs of every pair, those that failed being empty; None with too many failures.

    ``after`` is called after each.
    """
    found, count, first = [], 0, ""
    for pair in pairs:
        try:
            found.append(installed.align(pair, timeout))
        except ProgramError as error:
            count, first = count + 1, first or f"{' and '.join(map(clip, pair.names))}: it {error}"
            found.append(np.zeros((0, 2), dtype=np.int64))
            if count == MOST_FAILURES:
                return None, Failures(count, first)
        after()
    return found, Failures(count, first)
