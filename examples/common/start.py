"""How every example starts, and how it ends."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

INTERRUPTED = 130
"""Exit status after Ctrl-C."""


def start(package: str) -> NoReturn:
    """Import `package.cli` and exit with the status of its `main()`; Ctrl-C is clean from the first moment on."""
    signal.signal(signal.SIGINT, _stop)
    _fill_closed_streams()
    main = importlib.import_module(f"{package}.cli").main
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())


def exit_status(run: Callable[[], int | None], *errors: type[Exception], stopped: str = "stopped") -> int:
    """Run; its own exit status or 0, 1 after an error in a line, 130 after Ctrl-C, where the line is ``stopped``.

    ValueError, OSError, FloatingPointError and ``errors`` are told in a line; any other keeps its traceback.
    """
    told: tuple[type[Exception], ...] = (ValueError, OSError, FloatingPointError, *errors)
    try:
        return run() or 0
    except told as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return INTERRUPTED


def _fill_closed_streams() -> None:
    """Read and write nothing where a standard stream is closed, as by >&-: the next file would get its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing != number:
                os.dup2(nothing, number)
                os.close(nothing)
            setattr(sys, name, open(number, "w" if number else "r"))  # noqa: SIM115


def _stop(number: int, frame: object) -> None:
    # Libraries that are half imported turn a KeyboardInterrupt into anything: leave at once.
    os.write(2, b"stopped\n")
    os._exit(INTERRUPTED)
