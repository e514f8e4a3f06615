"""What the subcommands share: options, and how to name the command line in hints."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path

import torch

from ..config import Choice, Config, Range, option_name
from ..device import DEVICES
from ..source import MOST_TEXT, TooLargeError, is_stream, kept_copy
from ..stockholm import shown
from ..streaming import default_cache
from ..text import say

INTERRUPTED = 130
"""Exit status after Ctrl-C."""

NUMBERS = {setting.name: setting for setting in fields(Config) if setting.metadata}
"""The settings that are numbers or one of several names, each an option of ``train``."""

_THREADS = Range(1, 1024)
_TEXT = Range(1, 10**9)


def command_line() -> str:
    """What runs this example again in the user's shell: .venv need not be activated."""
    python, here = Path(sys.executable), Path.cwd()
    return f"{shlex.quote(str(python.relative_to(here) if python.is_relative_to(here) else python))} -m examples.pfam"


def add_number(parser: argparse.ArgumentParser, name: str, default: str) -> None:
    """The option of such a setting."""
    setting = NUMBERS[name]
    allowed = setting.metadata["allowed"]
    if isinstance(allowed, Choice):
        text = f"{setting.metadata['meaning']}: {', '.join(allowed.names)} (default: {default})"
        parser.add_argument(option_name(name), choices=allowed.names, metavar="NAME", help=text)
        return
    kind, metavar = (float, "X") if str(setting.type).startswith("float") else (int, "N")
    text = f"{setting.metadata['meaning']} (default: {default})"
    parser.add_argument(option_name(name), type=kind, metavar=metavar, help=text)


def given_settings(options: argparse.Namespace, config: Config) -> Config:
    """``config`` with the settings and the data that were given on the command line."""
    given = {name: getattr(options, name) for name in NUMBERS if getattr(options, name, None) is not None}
    if options.data:
        given |= {"data": options.data, "eval_data": options.eval_data}
    elif options.eval_data:
        given["eval_data"] = options.eval_data
    return replace(config, **given)


def add_reading(parser: argparse.ArgumentParser) -> None:
    """``--max-text`` and ``--cache``."""
    text = f"megabytes of text, unpacked, that are read of the data; more is refused (default: {MOST_TEXT})"
    parser.add_argument("--max-text", type=int, metavar="N", default=MOST_TEXT, help=text)
    text = f"folder for the stores of data read from disk (default: {default_cache()})"
    parser.add_argument("--cache", metavar="PATH", help=text)


def check_reading(options: argparse.Namespace) -> None:
    """Raise ValueError if ``--max-text`` is out of range."""
    _TEXT.check("--max-text", options.max_text)


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


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """``--quiet``."""
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device`` and ``--threads``."""
    text = f"{', '.join(DEVICES)}; xla: torch_xla's, all its TPUs or its CPU; tpu: TorchTPU's (default: cpu)"
    parser.add_argument("--device", choices=DEVICES, default="cpu", metavar="NAME", help=text)
    add_threads(parser)


def add_threads(parser: argparse.ArgumentParser) -> None:
    """``--threads``."""
    parser.add_argument("--threads", type=int, metavar="N", help="threads for PyTorch (default: PyTorch's choice)")


def set_threads(options: argparse.Namespace) -> None:
    """Do as ``--threads`` says, where the subcommand has it.

    Raises:
        ValueError: it is out of range.
    """
    if getattr(options, "threads", None) is not None:
        _THREADS.check("--threads", options.threads)
        torch.set_num_threads(options.threads)
