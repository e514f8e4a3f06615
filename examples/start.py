"""How every example's `__main__` starts."""

import importlib
import os
import signal
import sys
from typing import NoReturn


def start(package: str) -> NoReturn:
    """Import `package.cli` and exit with the status of its `main()`; Ctrl-C is clean from the first moment on."""
    signal.signal(signal.SIGINT, _stop)
    main = importlib.import_module(f"{package}.cli").main
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())


def _stop(number: int, frame: object) -> None:
    # Libraries that are half imported turn a KeyboardInterrupt into anything: leave at once.
    os.write(2, b"stopped\n")
    os._exit(130)
