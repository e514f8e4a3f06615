"""Loops that Numba compiles: how, and where what was compiled is kept."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba

from examples.common.text import say


def loop(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: compiled at the first call, without the interpreter's lock, by ``options`` of ``numba.njit``.

    What was compiled is kept beside the function's file, or in the user's cache where that is read-only. Where neither
    can be written, which is said once, every process compiles again.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, nogil=True, **options)(function)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            _say_once()
            return numba.njit(nogil=True, **options)(function)

    return decorate


@lru_cache(maxsize=1)
def _say_once() -> None:
    say(
        "note: there is no folder to keep compiled loops in, so every start takes half a minute more; "
        "NUMBA_CACHE_DIR can name one",
        sys.stderr,
    )
