"""The environment in which libtpu compiles without a TPU, and without taking one where there is one.

Nothing here imports jax or torch_xla: both read the environment when they are imported, and libtpu when it is loaded.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

DUMP = "TORCH_SINKHORN_ATTN_AOT_DUMP"
"""The folder that the compiler's listings go to; libtpu is told once, when it is loaded."""

HOST = {
    "JAX_PLATFORMS": "cpu",
    "PJRT_DEVICE": "CPU",
    # Without these three, libtpu waits for a metadata server that only a TPU VM has.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_LOG_DIR": "disabled",
}


def variables(dump: str | Path) -> dict[str, str]:
    """What to set in a process that compiles, its listings to go to the folder `dump`."""
    flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
    return {**HOST, DUMP: str(dump), "LIBTPU_INIT_ARGS": flags}


def prepare() -> Path:
    """Make this process one that compiles, and return the folder of the listings.

    Idempotent; does nothing in a process started with `variables`.

    Raises:
        RuntimeError: jax has started its devices, or torch_xla was imported, before: too late.
    """
    if DUMP in os.environ:
        return Path(os.environ[DUMP])
    jax = sys.modules.get("jax")
    started = jax is not None and jax._src.xla_bridge.backends_are_initialized()
    if started or "torch_xla" in sys.modules:
        raise RuntimeError("the compiler's environment must be set before jax or torch_xla starts its devices")
    folder = tempfile.mkdtemp(prefix="sinkhorn-aot-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ.update(variables(folder))
    if jax is not None:
        jax.config.update("jax_platforms", HOST["JAX_PLATFORMS"])
    return Path(os.environ[DUMP])


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # no parent package, or one that does not import; a module without a spec
        return False


def missing(*modules: str) -> str | None:
    """What to install if one of the modules is not there, in a sentence; None if all are."""
    absent = [name for name in modules if not _installed(name)]
    if not absent:
        return None
    needed = f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed"
    if "torch_xla" in absent:
        return f"{needed}: pip install 'torch_sinkhorn_attn[tpu]'"
    return f"{needed}: pip install 'torch_sinkhorn_attn[tpu]', or, in an environment without torch, jax and libtpu"
