"""Alignments too many for memory: converted once into files from which single sequences are read when they are drawn.

A store is a folder of three files. ``chains.bin`` holds, one sequence after the other, the steps from column to column
[n] (uint16), the residue codes [n] (uint8, plus 128 where upper case), the name (UTF-8): three bytes a residue.
``chains.idx`` holds 16 bytes a sequence: where it is, its residues, its name's bytes. ``families.json`` names the
families, the source it was made from, and the size of the other two. Memory is taken by the families' names alone.
Files are opened for each reading, not mapped: pages of a map count as the process's memory, and an open file cannot be
handed to workers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from tqdm import tqdm

from examples.common.text import file_stems

from .pairs import Chain, Family, family_from_alignment
from .source import MOST_TEXT
from .stockholm import Alignment, read_stockholm, shown, stockholm_files

_CHAINS, _INDEX, _FAMILIES = "chains.bin", "chains.idx", "families.json"
_RECORD = np.dtype([("at", "<i8"), ("residues", "<i4"), ("name", "<i4")])
_VERSION = 2
_HEAD = 1 << 16
_UPPER = 128
_WIDEST_GAP = 2**16 - 1


def default_cache() -> Path:
    """Where stores are kept unless told otherwise; safe to delete when no run uses it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "torch_sinkhorn_attn" / "pfam"


@dataclass(frozen=True)
class StoredChains(Sequence[Chain]):
    """Some consecutive sequences of a store, each read when it is asked for."""

    folder: Path
    first: int
    length: int

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> Chain: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Chain]: ...

    def __getitem__(self, index: int | slice) -> Chain | Sequence[Chain]:
        if isinstance(index, slice):
            start, stop, step = index.indices(self.length)
            if step != 1:
                raise ValueError(f"a slice of stored sequences takes every one, got a step of {step}")
            return StoredChains(self.folder, self.first + start, max(stop - start, 0))
        if not -self.length <= index < self.length:
            raise IndexError(f"sequence {index} of {self.length}")
        number = self.first + index % self.length
        record = np.fromfile(os.path.join(self.folder, _INDEX), _RECORD, 1, offset=number * _RECORD.itemsize)[0]
        n = int(record["residues"])
        data = np.fromfile(
            os.path.join(self.folder, _CHAINS), np.uint8, 3 * n + int(record["name"]), offset=int(record["at"])
        )
        columns = np.cumsum(data[: 2 * n].view("<u2"), dtype=np.int32)
        codes = data[2 * n : 3 * n]
        residues = (codes & (_UPPER - 1)).astype(np.int8)
        return Chain(data[3 * n :].tobytes().decode("utf-8"), residues, columns, codes >= _UPPER)


def stored_families(source: str | Path, cache: str | Path | None = None, max_text: float = MOST_TEXT) -> list[Family]:
    """The families of a Stockholm file or directory, those of one sequence too, their sequences on disk.

    The store is made on the first call and used again while the source's files keep their names, sizes, times of
    change and first 64 KiB. It appears whole or not at all, so several processes may ask at once.

    Args:
        cache: the folder to keep stores in, ``default_cache()`` by default.
        max_text: megabytes of text, unpacked, that are read at most.

    Raises:
        OSError: it cannot be written to; the message names ``--cache``.
        StockholmError: the source breaks the format.
    """
    source = Path(source).resolve()
    cache = default_cache() if cache is None else Path(cache)
    signature = _signature(source)
    digest = hashlib.sha256(json.dumps([str(source), signature]).encode()).hexdigest()[:16]
    folder = cache / f"{file_stems([source.name.split('.')[0]])[0]}-{digest}"
    listed = _read_list(folder, signature)
    if listed is None:
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        try:
            partial.mkdir(parents=True)
            listed = _write(partial, read_stockholm(source, max_text), signature)
            _publish(partial, folder)
        except OSError as error:
            reason = f"cannot convert {shown(source)} into --cache {cache} ({error.strerror or error})"
            raise OSError(f"{reason}; choose another folder for it") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return [
        Family(name, accession, StoredChains(folder, first, count), nucleotides)
        for name, accession, first, count, nucleotides in listed
    ]


def _signature(source: Path) -> list[Any]:
    files = []
    for file in stockholm_files(source):
        status = file.stat()
        with open(file, "rb") as raw:
            head = hashlib.sha256(raw.read(_HEAD)).hexdigest()
        files.append([str(file), status.st_size, status.st_mtime_ns, head])
    return [_VERSION, files]


def _read_list(folder: Path, signature: list[Any]) -> list[Any] | None:
    """The families of a store; None unless it is there, whole and of that source."""
    try:
        described = json.loads((folder / _FAMILIES).read_text())
        sizes = [(folder / name).stat().st_size for name in (_CHAINS, _INDEX)]
    except (OSError, ValueError):
        return None
    if not isinstance(described, dict) or (described.get("signature"), described.get("sizes")) != (signature, sizes):
        return None
    return list(described["families"])


def _write(folder: Path, alignments: Iterable[Alignment], signature: list[Any]) -> list[Any]:
    """Fill a store; its families as (name, accession, first sequence, sequences, nucleotides)."""
    listed, at, total = [], 0, 0
    with open(folder / _CHAINS, "wb") as chains, open(folder / _INDEX, "wb") as index:
        for alignment in tqdm(alignments, "indexing", unit=" families", leave=False, disable=None):
            family = family_from_alignment(alignment)
            records = np.empty(len(family.sequences), _RECORD)
            for record, chain in zip(records, family.sequences, strict=True):
                data = _packed(chain, alignment.source)
                record["at"], record["residues"], record["name"] = at, len(chain), len(data) - 3 * len(chain)
                at += chains.write(data)
            index.write(records.tobytes())
            listed.append([family.name, family.accession, total, len(records), family.nucleotides])
            total += len(records)
    described = {"signature": signature, "sizes": [at, total * _RECORD.itemsize], "families": listed}
    (folder / _FAMILIES).write_text(json.dumps(described))
    return listed


def _packed(chain: Chain, source: str) -> bytes:
    steps = chain.columns.copy()
    steps[1:] -= chain.columns[:-1]
    if steps.max() > _WIDEST_GAP:
        raise ValueError(f"{source}: the row of {chain.name} has a gap of more than {_WIDEST_GAP} columns")
    codes = chain.residues.astype(np.uint8) + _UPPER * chain.matched.astype(np.uint8)
    return steps.astype("<u2").tobytes() + codes.tobytes() + chain.name.encode("utf-8")


def _publish(partial: Path, folder: Path) -> None:
    """Give a finished store its name; another process may have been faster, or a damaged one may be in the way."""
    try:
        partial.rename(folder)
    except OSError:
        damaged = partial.with_name(f"{partial.name}.old")
        folder.rename(damaged)
        partial.rename(folder)
        shutil.rmtree(damaged, ignore_errors=True)
