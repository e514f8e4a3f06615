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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("version", "serves"), [("2.8.0", False), ("2.9.1+cpu", True), ("2.15.0", True), ("3.0.0a0+git", True)]
)
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


def said_of(program, **how):
    done = python("-c", f"import json, sinkhorn_build as b; print(json.dumps({program}))", **how)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_symbols_that_a_later_release_may_lack_are_found(tmp_path):
    """A library for all releases takes C functions of torch's stable ABI and the system's, and nothing else."""
    for name in ("stable/c/shim.h", "inductor/aoti_torch/c/shim.h", "inductor/aoti_torch/generated/c_shim_aten.h"):
        header = tmp_path / "torch/include/torch/csrc" / name
        header.parent.mkdir(parents=True)
        header.write_text("AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* ret_dim);")
    source, library = tmp_path / "library.c", tmp_path / "library.so"
    source.write_text(
        "int aoti_torch_get_dim(); int _ZN2at5emptyEv(); int aoti_torch_get(); void* malloc(unsigned long);\n"
        "int f() { return malloc(1) && aoti_torch_get_dim() && _ZN2at5emptyEv() && aoti_torch_get(); }\n"
    )
    if subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library], capture_output=True).returncode:
        pytest.skip("needs a C compiler")
    torch = f"b.Torch({{'version': '2.10.0', 'folder': {str(tmp_path / 'torch')!r}}}, {{}})"
    found = said_of(f"b.unpromised(b.symbols_needed(b.Path({str(library)!r})), {torch})")
    assert sorted(found) == ["_ZN2at5emptyEv", "aoti_torch_get"]


def test_the_tag_is_that_of_the_newest_symbol():
    for needed, tag in (
        (["memcpy@GLIBC_2.14", "f"], "manylinux_2_17"),
        (["memcpy@GLIBC_2.14", "log@GLIBC_2.29", "x@GLIBCXX_3.4.21"], "manylinux_2_29"),
        (["memcpy@GLIBC_2.14", "wait@GLIBCXX_3.4.30"], "manylinux_2_35"),
        (["memcpy"], None),
        (["memcpy@GLIBC_2.14", "x@GLIBCXX_3.4.99"], None),
    ):
        assert said_of(f"b.manylinux({needed!r})") == tag


@pytest.mark.parametrize(("version", "serves"), [("2.9.1", "2.9"), ("2.10.0+cpu", "2.10+"), ("2.16.0a0", "2.10+")])
def test_which_releases_a_library_is_for(version, serves):
    assert said_of(f"b.Torch({{'version': {version!r}, 'folder': ''}}, {{}}).serves") == serves


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
