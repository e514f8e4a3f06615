"""Loops that Numba compiles: how, and where what was compiled is kept."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba

from examples.common.text import one_line, say


def loop(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: compiled at the first call, without the interpreter's lock, by ``options`` of ``numba.njit``.

    What was compiled is kept beside the function's file, or in the user's cache where that is read-only. Where neither
    can be written, which is said once, every process compiles again. What is damaged there is compiled anew.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return _guarded(numba.njit(cache=True, nogil=True, **options)(function))
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            _say_once()
            return numba.njit(nogil=True, **options)(function)

    return decorate


def _guarded(compiled: Any) -> Any:
    """Numba's cache neither syncs nor checks what it writes, and raises anything of what a crash left."""
    kept = getattr(compiled, "_cache", None)
    if kept is None:  # as with NUMBA_DISABLE_JIT
        return compiled
    load, save = kept.load_overload, kept.save_overload

    def loaded(*given: Any) -> Any:
        try:
            return load(*given)
        except Exception as error:
            say(f"note: {kept.cache_path} holds a damaged loop ({one_line(error)}); it is compiled anew", sys.stderr)
            with contextlib.suppress(OSError):
                kept.flush()
            return None

    def saved(*given: Any) -> None:
        with contextlib.suppress(OSError):  # as on a full disk: it is compiled again the next time
            save(*given)

    kept.load_overload, kept.save_overload = loaded, saved
    return compiled


@lru_cache(maxsize=1)
def _say_once() -> None:
    say(
        "note: there is no folder to keep compiled loops in, so every start takes half a minute more; "
        "NUMBA_CACHE_DIR can name one",
        sys.stderr,
    )
