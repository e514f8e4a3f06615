"""What the subcommands share: options, and how to name the command line in hints."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from examples.common.files import is_stream
from examples.common.settings import Range, add_threads, given, option_name, settings_of
from examples.common.text import say

from ..config import Config
from ..device import DEVICES
from ..source import MOST_TEXT, TooLargeError, kept_copy
from ..stockholm import shown
from ..streaming import default_cache

NUMBERS = settings_of(Config)
"""The settings that are numbers or one of several names, each an option of ``train``."""

_TEXT = Range(1, 10**9)


def command_line() -> str:
    """What runs this example again in the user's shell: .venv need not be activated."""
    python, here = Path(sys.executable), Path.cwd()
    return f"{shlex.quote(str(python.relative_to(here) if python.is_relative_to(here) else python))} -m examples.pfam"


def given_settings(options: argparse.Namespace, config: Config) -> Config:
    """``config`` with the settings and the data that were given on the command line."""
    found = given(options, Config)
    if options.data:
        found |= {"data": options.data, "eval_data": options.eval_data}
    elif options.eval_data:
        found["eval_data"] = options.eval_data
    return replace(config, **found)


def named_path(text: str) -> Path:
    """An option's value; ``argparse`` says which one is empty, as of a shell's variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name a file or a folder")
    return Path(text)


def add_reading(parser: argparse.ArgumentParser) -> None:
    """``--max-text`` and ``--cache``."""
    text = f"megabytes of text, unpacked, that are read of the data; more is refused (default: {MOST_TEXT})"
    parser.add_argument("--max-text", type=int, metavar="N", default=MOST_TEXT, help=text)
    text = f"folder for the stores of data read from disk (default: {default_cache()})"
    parser.add_argument("--cache", metavar="PATH", help=text)


def check_reading(options: argparse.Namespace) -> None:
    """Raise ValueError if ``--max-text`` is out of range, or a path is empty."""
    _TEXT.check("--max-text", options.max_text)
    for name in ("data", "eval_data", "cache"):
        if getattr(options, name, None) == "":
            raise ValueError(f"{option_name(name)} is empty; name a file or a folder, or leave it out")


def keep_streams(options: argparse.Namespace, processes: int = 1) -> None:
    """Put files in the place of pipes given as ``--data`` and ``--eval-data``, which a run reads more than once.

    Raises:
        ValueError: several processes would have to read one, or there is too much in it.
    """
    kept: dict[str, str] = {}
    for name in ("data", "eval_data"):
        path = getattr(options, name)
        if path is None or not is_stream(path):
            continue
        if processes > 1:
            raise ValueError(f"{option_name(name)} {shown(path)} is a pipe, which {processes} processes cannot share")
        if path not in kept:
            folder = Path(options.cache or default_cache())
            try:
                kept[path] = str(kept_copy(path, folder, options.max_text))
            except TooLargeError as error:
                raise ValueError(f"{shown(path)} holds {error}; --max-text allows more") from error
            say(f"note: {shown(path)} is kept as {kept[path]}, for it is read again", sys.stderr)
        setattr(options, name, kept[path])


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device`` and ``--threads``."""
    text = f"{', '.join(DEVICES)}; xla: torch_xla's, all its TPUs or its CPU; tpu: TorchTPU's (default: cpu)"
    parser.add_argument("--device", choices=DEVICES, default="cpu", metavar="NAME", help=text)
    add_threads(parser)
