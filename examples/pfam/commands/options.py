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

INTERRUPTED = 130
"""Exit status after Ctrl-C."""

NUMBERS = {setting.name: setting for setting in fields(Config) if setting.metadata}
"""The settings that are numbers or one of several names, each an option of ``train``."""

_THREADS = Range(1, 1024)


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


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """``--quiet``."""
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device`` and ``--threads``."""
    text = f"{' or '.join(DEVICES)}, XLA's through torch_xla: all its TPUs, or its CPU (default: cpu)"
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
