"""Peak memory of one call: what the process itself grew by, so that C++ and XLA count like tensors."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from .cases import Case
from .functions import Outcome, ours
from .rivals import rivals

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
Result = TypeVar("Result")
WARM_UP = 256  # tokens of the call that comes before the one that is measured


class Once(NamedTuple):
    """One call in a process of its own."""

    outcome: Outcome
    peak: int | None  # bytes; None where the system does not tell


def fresh(name: str, case: Case, backward: bool, threads: int) -> Once | None:
    """Call the function in a new process; None if that died, as one does that asks for too much memory."""
    method = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
    with ProcessPoolExecutor(1, mp_context=get_context(method)) as pool:
        try:
            return pool.submit(_once, name, case, backward, threads).result()
        except BrokenProcessPool:
            return None


def _once(name: str, case: Case, backward: bool, threads: int) -> Once:
    torch.set_num_threads(threads)
    (function,) = (f for f in [*ours(), *rivals(threads)[0]] if f.name == name)
    warm = replace(case, batch=1, length=min(WARM_UP, case.length))
    function.prepare(warm, backward)()
    return _measured(function.prepare(case, backward))


def _measured(run: Callable[[], Outcome]) -> Once:
    return Once(*grown(run))


def grown(run: Callable[[], Result]) -> tuple[Result, int | None]:
    """What `run` returns, and the bytes that the resident set of this process grew by; None where the system does not
    tell."""
    gc.collect()
    before = _restart_peak()
    result = run()
    return result, None if before is None else max(0, _status("VmHWM") - before)


def _restart_peak() -> int | None:
    """Give back what is free, let the peak resident set begin from now on, and return it."""
    if not (CLEAR.exists() and STATUS.exists()):
        return None
    with contextlib.suppress(AttributeError, OSError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    try:
        CLEAR.write_text("5")
    except OSError:
        return None
    return _status("VmHWM")


def _status(field: str) -> int:
    (line,) = (x for x in STATUS.read_text().splitlines() if x.startswith(field + ":"))
    return 1024 * int(line.split()[1])
