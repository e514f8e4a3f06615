"""Building from source: which torch the kernels are compiled against, and a sentence where tools are missing or old."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
ASK = """
import json, sinkhorn_build as b
print(json.dumps([b.build_requirements(), getattr(b.find_torch(), "version", None)]))
"""
HIDE = "import sys; sys.path[:] = [x for x in sys.path if not x.endswith(('site-packages', 'dist-packages'))]"


def python(*command, path=(), executable=sys.executable, cwd=ROOT, **environment):
    """A Python with `path` and the build folder on PYTHONPATH, run as a frontend runs a backend."""
    paths = os.pathsep.join(map(str, [*path, ROOT / "build_backend"]))
    given = {**os.environ, "PYTHONPATH": paths, **environment}
    return subprocess.run([executable, *map(str, command)], cwd=cwd, env=given, capture_output=True, text=True)


def asked(**how):
    done = python("-c", ASK, **how)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The Python of an environment where nothing is installed."""
    folder = tmp_path_factory.mktemp("bare environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin" / "python"


def test_an_isolated_build_finds_the_torch_that_the_package_will_run_with(tmp_path):
    """pip hides the environment's packages from the build that it runs by the environment's Python."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    assert python("-c", "import torch", path=[tmp_path]).returncode != 0
    import torch

    assert asked(path=[tmp_path]) == [[], torch.__version__]


def test_torch_is_required_where_kernels_could_be_compiled_against_it(bare):
    (found,), version = asked(executable=bare)
    assert version is None and str(Requirement(found)) == "torch>=2.9"
    for environment in ({"CXX": "/nowhere/c++"}, {"CXX": ""}, {"TORCH_SINKHORN_ATTN_BUILD_CPU": "0"}):
        assert asked(executable=bare, **environment) == [[], None]
    assert asked(executable=bare, CXX="g++ -O1")[0] == [found]


@pytest.mark.parametrize(("version", "serves"), [("2.8.0", False), ("2.9.1+cpu", True), ("2.15.0", True), ("3.0.0a0+git", True)])
def test_a_torch_that_is_not_too_old_serves(tmp_path, bare, version, serves):
    (tmp_path / "torch").mkdir()
    source = f"__version__ = {version!r}\n"
    (tmp_path / "torch/__init__.py").write_text(source)
    needed, found = asked(path=[tmp_path], executable=bare)
    assert (found == version, needed == []) == (serves, serves)
    if not serves:
        why = "import sinkhorn_build as b; print(b.find_torch())"
        said = python("-c", why, path=[tmp_path], executable=bare).stdout
        assert "torch could not be imported" in said or f"torch {version} is installed" in said


@pytest.mark.parametrize("command", [["setup.py", "--version"], ["-c", "import backend"]], ids=["setup.py", "pip"])
def test_old_and_missing_tools_get_a_sentence(tmp_path, bare, command):
    (tmp_path / "setuptools").mkdir()
    (tmp_path / "setuptools/__init__.py").write_text('__version__ = "65.5.0"')
    done = python(*command, path=[tmp_path])
    assert done.returncode != 0 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "needs setuptools 77 or later, and 65.5.0 is installed: pip install -U setuptools" in done.stderr
    done = python(*command, executable=bare)
    assert done.returncode != 0 and done.stderr.startswith("Building torch_sinkhorn_attn needs setuptools 77 or later")
    old = "import sys; sys.version_info = (3, 9, 1); sys.version = '3.9.1 (x)'"
    done = python("-c", f"{old}; import backend")
    assert done.stderr == "torch_sinkhorn_attn needs Python 3.10 or later, and this is 3.9.1.\n"


def test_a_source_folder_that_cannot_be_written_gets_a_sentence():
    done = python("-c", "import os; os.access = lambda *_: False; import backend")
    assert done.returncode != 0
    assert done.stderr == f"{ROOT} cannot be written, and setuptools builds there: copy it, and install the copy.\n"


def test_what_is_left_out_is_told_at_the_terminal_that_pip_runs_in():
    """pip keeps what a build prints to itself."""
    outer, inner = pty.openpty()
    take = f"import os, fcntl, termios; os.setsid(); fcntl.ioctl({inner}, termios.TIOCSCTTY, 0)"
    command = [sys.executable, "-c", f"{take}; import sinkhorn_build; sinkhorn_build.tell('left out')"]
    given = {**os.environ, "PYTHONPATH": str(ROOT / "build_backend"), "PIP_BUILD_TRACKER": "x"}
    done = subprocess.run(command, env=given, pass_fds=[inner], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "left out\n"
    assert b"left out" in os.read(outer, 1000)
    os.close(outer)
    os.close(inner)
