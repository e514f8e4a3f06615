"""Command line: the subcommands of ``commands``, their errors, their exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .commands import ablate, align, download, evaluate, release, train
from .commands.options import INTERRUPTED, command_line, set_threads
from .download import DownloadError

_COMMANDS = (train, evaluate, align, ablate, release, download)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; the exit status is 0, 1 after a plain error message, or 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or (arguments[0].startswith("--") and arguments[0] != "--help"):
        arguments = ["train", *arguments]
    options = _parser().parse_args(arguments)
    try:
        set_threads(options)
        return int(options.run(options))
    except (ValueError, OSError, DownloadError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=command_line(),
        description="Align two proteins, or train, score and release an aligner. Without a command it trains.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.register(commands)
    return parser
