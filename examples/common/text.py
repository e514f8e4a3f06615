"""Text that others wrote, such as names, descriptions, paths and settings, as text: never terminal control or markup.

What comes from sequence files passes ``decoded`` where it is read, whatever is printed passes ``say``, and names in
pictures are drawn by ``plots.py``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import unicodedata
from collections.abc import Iterable
from typing import TextIO

BLANKS = " \t\v\f\r\n"
"""What separates fields. Unicode has other blanks, which may stand in a name."""

_STEM = 80
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def visible(text: str, keep: str = "") -> str:
    """With every character that is not to be seen escaped as Python does, ESC as \\x1b: control and format characters,
    those that reverse the direction of writing, line separators, halves of surrogate pairs; but for those in ``keep``.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep or unicodedata.category(c) == "Zs" else _escaped(c) for c in text)


def utf8(raw: str) -> str:
    """Text that was read as Latin-1, a character a byte: UTF-8 if it is that, else as it is."""
    if not raw.isascii():
        with contextlib.suppress(UnicodeDecodeError):
            return raw.encode("latin-1").decode("utf-8")
    return raw


def decoded(raw: str) -> str:
    """``utf8``, made ``visible``: how every name and description comes in."""
    return visible(utf8(raw))


def say(text: str, file: TextIO | None = None) -> None:
    """Print to standard output or ``file``; lines stay lines."""
    print(visible(text, keep="\n\t"), file=file or sys.stdout)


def one_line(error: BaseException) -> str:
    """An error's message, visible; line ends too, for a file's name may hold some."""
    return visible(str(error).strip()) or type(error).__name__


def clip(text: str, most: int = 40) -> str:
    """The beginning of what is longer than ``most``."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def file_stems(names: Iterable[str]) -> list[str]:
    """For each of distinct names a part of a file's name: letters, digits and '._=+-' of ASCII, '_' for anything else,
    short, and no two alike even where case does not count."""
    stems: list[str] = []
    taken: set[str] = set()
    for name in names:
        stem = re.sub(r"[^A-Za-z0-9._=+ -]", "_", name)[:_STEM].strip(" .") or "_"
        if stem.casefold() in taken or _RESERVED.fullmatch(stem):
            stem += "-" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        taken.add(stem.casefold())
        stems.append(stem)
    return stems


def quiet_end(lost: bool = False) -> None:
    """Forget what nobody reads or no disk holds, so that the end of the process does not complain of it again.

    ``lost`` says that standard output is known to be such.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
            broken = lost and stream is sys.stdout
        except (OSError, ValueError):
            broken = True
        if broken:
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), stream.fileno())


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
