"""What installed aligners found, in a file: beside another aligner on the same pairs they need not run again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .pairs import Pair
from .programs import Failures, Installed, IntArray, align_all

_WRITER = "examples.pfam evaluate --program-results"


@dataclass(frozen=True)
class ProgramResults:
    """Residue pairs [p, 2] of every pair, None with too many failures; and seconds, of time and of processors."""

    found: list[IntArray] | None
    failures: Failures
    seconds: tuple[float, float]


Run = Callable[[], ProgramResults]


def align_program(
    installed: Installed,
    pairs: Sequence[Pair],
    timeout: float,
    clock: Callable[[], tuple[float, float]],
    after: Callable[[], object] = lambda: None,
) -> ProgramResults:
    """``programs.align_all``, with the time that it took by ``clock``."""
    start = clock()
    found, failures = align_all(installed, pairs, timeout, after)
    wall, cpu = (now - then for now, then in zip(clock(), start, strict=True))
    return ProgramResults(found, failures, (wall, cpu))


def remembered(
    path: Path | None, installed: Installed, pairs: Sequence[Pair], timeout: float, run: Run
) -> ProgramResults:
    """Those in the file at ``path`` of the same program, version, pairs and time limit; or those of ``run``, which are
    then added to it, unless they failed.

    Raises:
        ValueError: the file was not written by this function.
        OSError: it cannot be read or written.
    """
    if path is None:
        return run()
    asked = {"written_by": _WRITER, "program": installed.label, "pairs": _digest(pairs), "timeout": timeout}
    for record in _records(path):
        if {name: record[name] for name in asked} == asked:
            found: list[IntArray] = [np.array(one, dtype=np.int64).reshape(2, -1).T for one in record["found"]]
            return ProgramResults(found, Failures(*record["failures"]), (record["seconds"][0], record["seconds"][1]))
    results = run()
    if results.found is not None:
        record = {
            **asked,
            "seconds": results.seconds,
            "failures": [results.failures.count, results.failures.first],
            "found": [one.T.tolist() for one in results.found],
        }
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())
    return results


def check_program_results(path: Path) -> None:
    """See that what is there, if anything, was written by ``remembered``, and that more can be.

    Raises:
        ValueError, OSError: as there.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"--program-results {path} is no file; choose another name")
    try:
        _records(path)
        with open(path, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise OSError(f"cannot write to --program-results {path} ({error.strerror}); choose another name") from error


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    records: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            record = json.loads(line)
            ours = record["written_by"] == _WRITER
        except (ValueError, TypeError, KeyError):
            ours = False
        if not ours:
            cut_off = line[-1:] != b"\n" and records
            what = "was cut off; remove it, or" if cut_off else "was not written by this command;"
            raise ValueError(f"--program-results {path}: line {number} {what} choose another file")
        records.append(record)
    return records


def _digest(pairs: Sequence[Pair]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        for side in (pair.query, pair.key):
            digest.update(len(side).to_bytes(8, "little") + np.asarray(side, dtype=np.uint8).tobytes())
    return digest.hexdigest()
