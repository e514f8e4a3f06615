"""Fetch Pfam-A.seed.gz: resumes a broken transfer, checks the archive, and only then gives it its name."""

from __future__ import annotations

import gzip
import os
import urllib.error
import urllib.request
import zlib
from pathlib import Path

from tqdm import tqdm

from examples.common.text import visible

from .source import GROWTH, UNSUSPICIOUS

PFAM_SEED_URL = "https://ftp.ebi.ac.uk/pub/databases/Pfam/current_release/Pfam-A.seed.gz"
_CHUNK = 1 << 20


class DownloadError(RuntimeError):
    """The transfer failed or delivered something else than a whole gzip file; the message says what to do."""


def download(url: str, path: str | Path, timeout: float = 60.0, progress: bool = True) -> Path:
    """Download a gzip file to ``path``; an existing file there is left alone.

    A transfer that breaks leaves ``path.part``, and the next call asks the server for the rest of it. The archive is
    read to its end (length and CRC-32) before it is moved to ``path``.

    Raises:
        DownloadError: the server could not be reached, broke off, or sent something that is not a gzip file.
    """
    path = Path(path)
    if path.is_dir():
        raise DownloadError(f"--out {path} is a folder; give the name of a file")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        _transfer(url, part, timeout, progress)
    except (urllib.error.URLError, OSError, ValueError) as error:
        kept = f"; {part} is kept, the same command goes on from there" if part.exists() else ""
        raise DownloadError(f"could not download {url}: {error}{kept}") from error
    problem = _gzip_problem(part, progress)
    if problem:
        part.unlink()
        raise DownloadError(f"{url} did not deliver a whole gzip file ({problem}); it was deleted, try again")
    os.replace(part, path)
    return path


def _transfer(url: str, part: Path, timeout: float, progress: bool) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing beyond what we have: the transfer was complete, the check was not reached
            return
        raise
    with response:
        resumed = response.status == 206
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with (
            open(part, "ab" if resumed else "wb") as file,
            tqdm(
                total=total, initial=have, unit="B", unit_scale=True, desc=visible(part.stem), disable=not progress
            ) as bar,
        ):
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and part.stat().st_size < total:
        raise OSError(f"the connection closed after {part.stat().st_size} of {total} bytes")


def _gzip_problem(path: Path, progress: bool) -> str | None:
    """What is wrong with a gzip file, read to its end, or None; one that grows without end is stopped."""
    most = max(GROWTH * path.stat().st_size, UNSUSPICIOUS)
    try:
        with (
            gzip.open(path) as stream,
            tqdm(unit="B", unit_scale=True, desc="checking", disable=not progress) as bar,
        ):
            while chunk := stream.read(_CHUNK):
                bar.update(len(chunk))
                if (most := most - len(chunk)) < 0:
                    return f"it grows more than {GROWTH}-fold"
    except (OSError, EOFError, zlib.error) as error:
        return str(error)
    return None
