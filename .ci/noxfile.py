"""`make matrix`: the package under every torch it claims, each in an environment of its own.

    make matrix                                       all rows, then the table of docs/releases.md
    make matrix ARGS="--session 'matrix(torch-2.13.0-python-3.11)'"     one row (ARGS=--list names them)

After `--` stand other tests than the usual.

One sdist is made. One wheel, built of it beside the oldest torch that has a stable ABI, is installed under that release
and every later one: the same file, and no compiler. Every row then builds the sdist with its own torch; torch 2.9, that
has no stable ABI, installs what it built itself. Versions are those of requirements.txt, but for torch and what is tied
to it. Pythons are looked up on PATH: a row whose Python is not there stays in the table as not run. An environment is
removed when its row is done, for it holds up to 6 GB.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import nox

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "matrix"
PAGE = ROOT / "docs" / "releases.md"
ROWS = [  # torch and Python: every minor release; the oldest and the newest of both
    ("2.9.0", "3.10"),
    ("2.10.0", "3.10"),
    ("2.11.0", "3.11"),
    ("2.12.1", "3.12"),
    ("2.13.0", "3.11"),
    ("2.14.1", "3.12"),
    ("2.15.0", "3.11"),
    ("2.15.0", "3.13"),
    ("2.15.0", "3.14"),
]
STABLE = ("2.10.0", "3.11")  # what the one wheel is built with
TIED = {"torch", "torch_xla", "jax", "jaxlib", "libtpu", "filelock", "fsspec", "sympy", "setuptools"}
TOOLS = ["numpy", "packaging", "pytest", "pytest-xdist", "scipy", "transformers"]
NEEDED = [
    f"tests/{name}.py"
    for name in (
        "boundary/test_modern", "boundary/test_ops", "engines/cpu/test_engine", "engines/cpu/test_ranks",
        "modules/test_module", "modules/test_parity", "integrations/transformers/test_attention", "test_conformance",
    )
]

nox.options.default_venv_backend = "virtualenv"
nox.options.envdir = str(BUILD / "environments")
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["sources", "wheel", "matrix", "table"]


@nox.session(python=False)
def sources(session: nox.Session) -> None:
    """The sdist, and the pins that every row shares."""
    shutil.rmtree(BUILD, ignore_errors=True)
    session.run(sys.executable, "-m", "build", "--sdist", "--no-isolation", f"--outdir={BUILD}", str(ROOT), silent=True)
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if re.split(r"[=\s]", line)[0] not in TIED]
    (BUILD / "pins.txt").write_text("\n".join(pins) + "\n")


@nox.session(python=STABLE[1])
def wheel(session: nox.Session) -> None:
    """The one wheel."""
    _install_torch(session, STABLE[0])
    _build(session, BUILD / "wheel")
    _discard(session)


@nox.session
@nox.parametrize("python,torch", [nox.param(p, t, id=f"torch-{t}-python-{p}") for t, p in ROWS])
def matrix(session: nox.Session, torch: str) -> None:
    """One row of the table."""
    row: dict[str, Any] = {"torch": torch, "python": str(session.python)}
    try:
        _install_torch(session, torch)
        session.install("--quiet", *TOOLS, f"--constraint={BUILD / 'pins.txt'}")
        folder = BUILD / f"{torch}-{session.python}"
        own, row["seconds to build"] = _build(session, folder)
        one = next((BUILD / "wheel").glob("*.whl"), own)  # without the session "wheel" each has its own
        chosen = own if torch.startswith("2.9.") else one
        row["wheel"] = "its own" if chosen is own else hashlib.sha256(one.read_bytes()).hexdigest()[:8]
        session.install("--quiet", "--no-deps", str(chosen))
        row |= _tests(session, folder)
    finally:
        (BUILD / f"{torch}-{session.python}.json").write_text(json.dumps(row))
        _discard(session)
    if row["failed"]:
        session.error(f"{row['failed']} tests failed")


@nox.session(python=False)
def table(session: nox.Session) -> None:
    """The rows that ran, in docs/releases.md."""
    text = PAGE.read_text()
    head, _, tail = re.split(r"(?<=<!-- matrix -->\n)(.*?)(?=<!-- end -->)", text, maxsplit=1, flags=re.S)
    PAGE.write_text(head + "\n".join(_lines()) + "\n" + tail)
    session.log(f"wrote {PAGE}" + (" (as it was)" if PAGE.read_text() == text else ""))


def _install_torch(session: nox.Session, torch: str) -> None:
    session.install("--quiet", f"torch=={torch}", "setuptools>=77", "wheel")


def _build(session: nox.Session, folder: Path) -> tuple[Path, float]:
    """The wheel of the sdist, built with the torch of the session, and the seconds that took."""
    begin = time.monotonic()
    session.run(
        "python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}",
        str(next(BUILD.glob("*.tar.gz"))), env={"TORCH_SINKHORN_ATTN_BUILD_CPU": "1"},
    )  # fmt: skip
    return next(folder.glob("*.whl")), round(time.monotonic() - begin)


def _tests(session: nox.Session, folder: Path) -> dict[str, int]:
    """The chosen tests, away from the sources, so that what is tested is the wheel."""
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    session.chdir(folder)
    loaded = "from torch_sinkhorn_attn.engines.cpu import __file__ as file, unavailable as why; print(file, why())"
    assert session.run("python", "-c", loaded, silent=True).split()[-1] == "None"
    session.run(
        "python", "-m", "pytest", "-o", "pythonpath=tests", "-n", "auto", "--maxprocesses=4", "--junitxml=found.xml",
        *(session.posargs or NEEDED), success_codes=[0, 1], env={"USE_TORCH_XLA": "0"},
    )  # fmt: skip
    suite = ElementTree.parse("found.xml").find("testsuite")
    assert suite is not None
    count = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    return {"passed": count["tests"] - failed - count["skipped"], "failed": failed, "skipped": count["skipped"]}


def _discard(session: nox.Session) -> None:
    session.chdir(ROOT)
    shutil.rmtree(session.virtualenv.location, ignore_errors=True)


def _lines() -> Iterator[str]:
    yield "| torch | Python | built from source, s | wheel | passed | skipped | failed |"
    yield "|---|---|---|---|---|---|---|"
    for torch, python in ROWS:
        path = BUILD / f"{torch}-{python}.json"
        row = json.loads(path.read_text()) if path.exists() else {}
        names = ("seconds to build", "wheel", "passed", "skipped", "failed")
        cells = [str(row.get(name, "no")) for name in names] if row else ["not run", *[""] * 4]
        yield "| " + " | ".join([torch, python, *cells]) + " |"
