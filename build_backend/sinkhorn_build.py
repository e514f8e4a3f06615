"""What building needs beside setuptools: the tools, and torch.

The C++ kernels are compiled against torch. An isolated build (`pip install .`) does not see the environment it installs
into, but pip runs it by that environment's Python: a torch found there is the one that the kernels will be used with,
and is taken. Where there is none (a fresh environment, `python -m build`, uv), torch is required of the isolated
environment, unless nothing could be compiled against it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = 77  # the first that reads a license expression, as pyproject.toml has
STABLE = (2, 10)  # the first release whose stable ABI has what the kernels need
BUILD_VARIABLE = "TORCH_SINKHORN_ATTN_BUILD_CPU"
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
_ISOLATION = ("PYTHONPATH", "PYTHONNOUSERSITE")  # what pip hides the environment with that it installs into
_PROMISES = ("stable/c/shim.h", "inductor/aoti_torch/c/shim.h", "inductor/aoti_torch/generated/c_shim_aten.h")
# The last GLIBCXX_3.4.X that systems with glibc 2.Y have, as auditwheel knows them.
_LIBSTDCXX = ((19, 17), (22, 24), (24, 27), (28, 31), (29, 34), (30, 35), (33, 39))
_PROBE = """
import json, torch
folder = torch.__file__.rpartition("__init__")[0]
print(json.dumps({"version": torch.__version__, "folder": folder}))
"""


def require_tools() -> None:
    """End with a sentence where Python or setuptools is too old to read what is here."""
    if sys.version_info < (3, 10):  # noqa: UP036
        sys.exit(f"torch_sinkhorn_attn needs Python 3.10 or later, and this is {sys.version.split()[0]}.")
    try:
        import setuptools
    except ImportError:
        sys.exit(f"Building torch_sinkhorn_attn needs setuptools {SETUPTOOLS} or later: pip install -U setuptools")
    if int(setuptools.__version__.partition(".")[0]) < SETUPTOOLS:
        sys.exit(
            f"Building torch_sinkhorn_attn needs setuptools {SETUPTOOLS} or later, and {setuptools.__version__} is "
            "installed: pip install -U setuptools, or leave --no-build-isolation out."
        )


class Torch:
    """An installed torch, seen from another process: how to compile against it, and how to run with it.

    Since 2.10 the kernels use its stable ABI, so that one library serves every release from 2.10 on, whichever it was
    compiled against; before, a library is for the release it was compiled against alone.
    """

    def __init__(self, found: dict[str, Any], environment: dict[str, str]):
        self.version: str = found["version"]
        release = _release(self.version)
        self.stable = release >= STABLE
        self.serves = ".".join(map(str, STABLE)) + "+" if self.stable else ".".join(map(str, release))
        self.environment = environment
        folder = Path(found["folder"])
        self.include = [folder / "include", folder / "include/torch/csrc/api/include"]
        self.libraries = folder / "lib"


def instruction_sets(machine: str) -> dict[str, list[str]]:
    """Those that the kernels are compiled for, with the flags PyTorch builds its own with."""
    sets: dict[str, list[str]] = {"DEFAULT": []}
    if machine.lower() in ("x86_64", "amd64"):
        sets["AVX2"] = ["-mavx2", "-mfma", "-mf16c"]
        sets["AVX512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
    return sets


def symbols_needed(library: Path) -> list[str]:
    """What a library of Linux takes from elsewhere, as `name` or `name@VERSION`; not what it can do without."""
    command = ["nm", "-D", "--undefined-only", "--format=posix", str(library)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [line.split()[0] for line in lines if line.split()[1] != "w"]


def unpromised(needed: list[str], torch: Torch) -> list[str]:
    """Those of the symbols of which neither the system nor torch's stable ABI promises that the next release has
    them."""
    headers = [torch.include[0] / "torch/csrc" / name for name in _PROMISES]
    promised = set(re.findall(r"\w+", "".join(header.read_text() for header in headers)))
    return [name for name in needed if not re.search("@+(GLIBC|GLIBCXX|CXXABI|GCC)_", name) and name not in promised]


def manylinux(needed: list[str]) -> str | None:
    """The first manylinux tag whose systems have the symbols, without the processor: "manylinux_2_28"; None if none."""
    text = " ".join(needed)
    glibc = [int(minor) for minor in re.findall(r"@GLIBC_2\.(\d+)", text)]
    libstdcxx = max((int(minor) for minor in re.findall(r"@GLIBCXX_3\.4\.(\d+)", text)), default=0)
    with_it = [minor for first, minor in _LIBSTDCXX if first >= libstdcxx]
    return f"manylinux_2_{max(*glibc, with_it[0])}" if glibc and with_it else None


def requirement() -> str:
    """The torch that the package depends on, as in pyproject.toml."""
    found = re.search(r'^dependencies = \["(torch[^"]*)"', (ROOT / "pyproject.toml").read_text(), flags=re.M)
    assert found is not None
    return found[1]


def find_torch() -> Torch | str:
    """The torch of this environment or else of the one that pip installs into; or why none will do."""
    hidden = {name: value for name, value in os.environ.items() if name not in _ISOLATION}
    reasons = []
    for environment in (dict(os.environ), hidden):
        command = [sys.executable, "-c", _PROBE]
        done = subprocess.run(command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True)
        if done.returncode:
            reasons.append(f"torch could not be imported ({_last_line(done.stderr)})")
            continue
        torch = Torch(json.loads(_last_line(done.stdout)), environment)
        if _supported(torch.version):
            return torch
        reasons.append(f"torch {torch.version} is installed, and {requirement()} is needed")
    return reasons[-1]


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]


def _supported(version: str) -> bool:
    return _release(version) >= _release(requirement())


def _release(text: str) -> tuple[int, ...]:
    """(A, B) of a version A.B.C, or of a requirement `>=A.B`."""
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def build_requirements() -> list[str]:
    """torch, where kernels can be compiled and have none to be compiled against; else nothing."""
    compiler = shlex.split(os.environ.get("CXX", sysconfig.get_config_var("CXX") or "c++"))
    can = os.name == "posix" and bool(compiler) and shutil.which(compiler[0]) is not None
    wanted = can and os.environ.get(BUILD_VARIABLE) != "0"
    return [requirement()] if wanted and isinstance(find_torch(), str) else []


def tell(message: str) -> None:
    """To the terminal too where pip builds, which keeps what a build prints to itself unless it fails."""
    print(message, file=sys.stderr)
    if "PIP_BUILD_TRACKER" in os.environ and not sys.stderr.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            print(f"\n{message}", file=terminal)
