"""Where a warning points: at the code of whoever uses the package."""

from __future__ import annotations

import sys


def users_level(*libraries: str) -> int:
    """The `stacklevel`, for the function that warns, of the nearest code that is neither this package's nor of one of
    the `libraries` that may have called it."""
    elsewhere = (__name__.partition(".")[0], *libraries)
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in elsewhere:
        level, frame = level + 1, frame.f_back
    return level
