"""Command line: the subcommands of ``commands``, their errors, their exit status."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from typing import Any

from examples.common.settings import set_threads
from examples.common.start import INTERRUPTED
from examples.common.text import clip, one_line, quiet_end, say, visible

from .commands import ablate, align, download, evaluate, flanks, profiles, release, train
from .commands.options import command_line
from .download import DownloadError

_COMMANDS = (train, evaluate, flanks, align, ablate, release, profiles, download)


_NO_READER = 141
"""Exit status when whoever reads the output has left, as `head` does: what a shell reports of SIGPIPE."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; the exit status is 0, 1 after an error in a sentence, 130 after Ctrl-C, 141 if nobody reads."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or (arguments[0].startswith("--") and arguments[0] != "--help"):
        arguments = ["train", *arguments]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names may hold letters that the terminal has not
    try:
        return _run(arguments)
    except BrokenPipeError:
        quiet_end(lost=True)
        return _NO_READER


def _run(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    try:
        set_threads(options)
        status = int(options.run(options))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        raise
    except (ValueError, OSError, DownloadError, ArithmeticError, RecursionError) as error:
        say(f"error: {one_line(error)}", sys.stderr)
        quiet_end()
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "alloc" not in str(error):
            raise  # a fault of the program, which its traceback may help to find
        say(f"error: there is not enough memory ({clip(one_line(error), 200)}); take less or shorter data", sys.stderr)
    except KeyboardInterrupt:
        say("stopped", sys.stderr)
        return INTERRUPTED
    return 1


class _Parser(argparse.ArgumentParser):
    """Shows what it was given as text."""

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(visible(message or "", keep="\n\t"), file)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=command_line(),
        description="Align two proteins, or train, score and release an aligner. Without a command it trains.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.register(commands)
    return parser
