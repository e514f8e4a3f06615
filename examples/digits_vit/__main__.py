"""``python -m examples.digits_vit``."""

import os
import signal
import sys


def _stop(number: int, frame: object) -> None:
    # Libraries that are half imported turn a KeyboardInterrupt into anything: leave at once.
    os.write(2, b"stopped\n")
    os._exit(130)


signal.signal(signal.SIGINT, _stop)

from .cli import main  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main())
