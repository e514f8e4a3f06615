"""The files of an alignment: aligned FASTA, Stockholm, JSON and the picture, in a folder of their own."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from Bio import AlignIO
from Bio.Align import MultipleSeqAlignment
from Bio.Seq import Seq
from Bio.SeqRecord import SeqRecord

from examples.common.files import prepare_folder, replacing

from .alignment import PairwiseAlignment
from .sequences import Protein

FASTA, STOCKHOLM, PICTURE, RECORD = "alignment.fasta", "alignment.sto", "plan.png", "alignment.json"
_WRITER = "examples.pfam align"


def check_folder(folder: str | Path) -> None:
    """Make the folder, and see that what will be replaced there was written by ``write_files`` and left alone since.

    Raises:
        FileExistsError: a file there is not ours; nothing was touched.
        OSError: the folder cannot be made or written to.
    """
    prepare_folder(folder)
    folder = Path(folder)
    hashes = _hashes(folder / RECORD)
    for name in (FASTA, STOCKHOLM, PICTURE, RECORD):
        path = folder / name
        ours = hashes is not None and (name == RECORD or not path.exists() or _hash(path) in hashes.get(name, ()))
        if path.exists() and not ours:
            raise FileExistsError(
                f"{path} was not written by this command, or was changed since; move it, or choose another --out"
            )


def write_files(
    folder: str | Path,
    proteins: tuple[Protein, Protein],
    alignment: PairwiseAlignment,
    picture: bytes,
    made_with: Mapping[str, str],
    homology: float | None = None,
) -> list[Path]:
    """Write the four files, and ``made_with`` and the probability of ``homology`` into the record.

    Files of the same names are replaced, once all four are written: on a full disk the old ones stay. The record, which
    knows both, is replaced first, so whatever a crash leaves is known to be ours.

    Raises:
        OSError: they cannot be written.
    """
    aligned = _biopython(proteins, alignment)
    contents = {
        FASTA: _formatted(aligned, "fasta"),
        STOCKHOLM: _formatted(aligned, "stockholm"),
        PICTURE: picture,
    }
    record = _record(proteins, alignment) | {"made_with": dict(made_with), "homology": homology}
    record["files"] = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    paths = {name: Path(folder) / name for name in (*contents, RECORD)}
    record["replaced"] = {name: _hash(paths[name]) for name in contents if paths[name].exists()}
    contents[RECORD] = (json.dumps(record) + "\n").encode()
    try:
        with contextlib.ExitStack() as stack:  # which ends with what was begun last, the record, first
            for name, data in contents.items():
                file = stack.enter_context(replacing(paths[name]))
                file.write(data)
                file.flush()
    except OSError as error:
        raise OSError(f"cannot write to --out {folder} ({error.strerror}); what was there is as it was") from error
    return list(paths.values())


def _record(proteins: tuple[Protein, Protein], alignment: PairwiseAlignment) -> dict[str, Any]:
    """What a program would want to know; residues are numbered from 1, as in the text."""
    pairs = alignment.columns[alignment.paired] + 1
    return {
        "written_by": _WRITER,
        "names": [protein.name for protein in proteins],
        "lengths": [len(letters) for letters in alignment.letters],
        "summary": asdict(alignment.summary()),
        "query_residues": pairs[:, 0].tolist(),
        "key_residues": pairs[:, 1].tolist(),
        "confidence": alignment.confidence[alignment.paired].round(6).tolist(),
    }


def _biopython(proteins: tuple[Protein, Protein], alignment: PairwiseAlignment) -> MultipleSeqAlignment:
    records = [
        SeqRecord(Seq(row), id=protein.name, name=protein.name, description=protein.description)
        for protein, row in zip(proteins, alignment.rows, strict=True)
    ]
    # Stockholm's PP_cons, which is where HMMER puts posterior probabilities too.
    return MultipleSeqAlignment(records, column_annotations={"posterior_probability": alignment.digits})


def _formatted(alignment: MultipleSeqAlignment, kind: str) -> bytes:
    text = io.StringIO()
    AlignIO.write(alignment, text, kind)
    return text.getvalue().encode()


def _hashes(record: Path) -> dict[str, tuple[str, ...]] | None:
    """Of the files as they were written, and before, by name; None if there is no record of ours."""
    try:
        values = json.loads(record.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or values.get("written_by") != _WRITER:
        return None
    written, replaced = values.get("files"), values.get("replaced", {})
    if not (isinstance(written, dict) and isinstance(replaced, dict)):
        return None
    return {name: (written[name], replaced.get(name, "")) for name in written}


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
