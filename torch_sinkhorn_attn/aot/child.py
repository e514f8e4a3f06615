"""A function of this package in a process of its own: libtpu reads its flags once, aborts on some errors, and chats.

The process need not have torch, which the JAX half of the package does without.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch_sinkhorn_attn.aot.environment import variables
from torch_sinkhorn_attn.aot.failures import explain

_PACKAGE = Path(__file__).resolve().parents[1]
# It ends with the process that wants its result, however that ends: then nothing holds the other end of its input.
_START = """
import importlib, json, os, sys, threading
threading.Thread(target=lambda: os._exit(1 + len(os.read(0, 1))), daemon=True).start()
path, target, result, arguments = sys.argv[1:5]
sys.path.insert(0, path)
module, _, function = target.partition(":")
try:
    found = getattr(importlib.import_module(module), function)(**json.loads(arguments))
except Exception as error:
    import traceback
    frame = traceback.extract_tb(error.__traceback__)[-1]
    found = {"error": str(error), "kind": type(error).__name__, "where": f"{frame.filename}:{frame.lineno}"}
with open(result, "w") as file:
    json.dump(found, file)
"""


def _inherited() -> dict[str, str]:
    """This process's environment, without the libtpu that a jax imported here has found: the other has its own."""
    return {name: value for name, value in os.environ.items() if name != "TPU_LIBRARY_PATH"}


@contextlib.contextmanager
def _held_open() -> Iterator[int]:
    """The end to read of a pipe that nothing is written to, and that ends with this process."""
    ends = os.pipe()
    try:
        yield ends[0]
    finally:
        for end in ends:
            os.close(end)


class CompileError(Exception):
    """The program cannot be compiled; the message says why in a line."""


def call(
    target: str,
    arguments: Mapping[str, Any],
    *,
    python: str | None = None,
    environment: Mapping[str, str] | None = None,
    keep: str | None = None,
) -> dict[str, Any]:
    """`module:function(**arguments)` in a new process, under `environment.variables`.

    Args:
        target: the function, which returns a dictionary; arguments and result go through JSON.
        python: an interpreter with jax and libtpu; this one by default.
        environment: further variables of the process.
        keep: a folder that the compiler's listings are copied to.

    Raises:
        CompileError: the function raised, or the process died.
    """
    with tempfile.TemporaryDirectory(prefix="sinkhorn-aot-") as folder:
        dump, result = Path(folder, "listings"), Path(folder, "result.json")
        dump.mkdir()
        path = _PACKAGE.parent
        if python is not None:  # has packages of its own: of this one's, this one alone
            path = Path(folder, "path")
            path.mkdir()
            (path / _PACKAGE.name).symlink_to(_PACKAGE, target_is_directory=True)
        command = [python or sys.executable, "-c", _START, str(path), target]
        with _held_open() as held:
            done = subprocess.run(
                [*command, str(result), json.dumps(dict(arguments))],
                env={**_inherited(), **variables(dump), **(environment or {})},
                stdin=held,
                capture_output=True,
                text=True,
                errors="replace",
            )
        if keep:
            shutil.copytree(dump, keep, dirs_exist_ok=True)
        if not result.exists():
            raise CompileError(_death(done.returncode, done.stderr))
        found: dict[str, Any] = json.loads(result.read_text())
    if "error" in found:
        raise CompileError(_reason(found))
    return found


def _reason(found: Mapping[str, str]) -> str:
    if found["kind"] in ("ModuleNotFoundError", "ImportError"):
        return f"{found['error']}; install what is missing, or give another Python by --python"
    if found["kind"] in ("AssertionError", "AttributeError", "KeyError", "NameError", "TypeError"):
        return f"{found['kind']} at {found['where']}: {found['error'] or 'no message'}"
    return explain(found["error"])


def _death(code: int, stderr: str) -> str:
    """Why a process left no result."""
    name = signal.Signals(-code).name if code < 0 else f"status {code}"
    checks = [line for line in stderr.splitlines() if "Check failed" in line or "error" in line.lower()]
    last = (checks or stderr.strip().splitlines() or ["no message"])[-1].strip()
    return f"the compiler ended with {name}: {last}"
