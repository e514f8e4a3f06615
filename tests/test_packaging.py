"""What a user installs: the wheel, tried from another directory, and the pins it is tested with."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import torch_sinkhorn_attn
from torch_sinkhorn_attn.compat import releases

ROOT = Path(__file__).parents[1]


def run(*command, cwd, path=(), **variables):
    """The output of a Python command that must succeed, with nothing but `path` on PYTHONPATH."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))} | variables
    arguments = [sys.executable, *map(str, command)]
    done = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def source_files():
    """Paths, relative to the root, of the files that git tracks or would."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a git checkout, to tell sources from what building and training leave")
    return sorted({name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()})


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The sdist, and the wheel built from it alone."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in source_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    portable = {"TORCH_SINKHORN_ATTN_PORTABLE": "1"}  # one instruction set: a third of the compiling
    run("-m", "build", "--no-isolation", "--outdir", dist, source, cwd=source, **portable)
    return next(dist.glob("*.tar.gz")), next(dist.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory):
    """A directory that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    wheel = distributions[1]
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel, cwd=target)
    return target


@pytest.mark.slow
def test_sdist_holds_every_source(distributions):
    with tarfile.open(distributions[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    expected = {name for name in source_files() if not name.startswith(".")}
    assert expected <= names, expected - names


@pytest.mark.slow
def test_wheel_holds_the_package_alone(distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        names = set(wheel.namelist())
    version = torch_sinkhorn_attn.__version__
    metadata = f"torch_sinkhorn_attn-{version}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"torch_sinkhorn_attn", metadata}
    assert f"{metadata}/licenses/LICENSE" in names
    package = {name for name in source_files() if name.startswith("torch_sinkhorn_attn/")}
    assert "torch_sinkhorn_attn/py.typed" in package
    assert package <= names, package - names


@pytest.mark.slow
def test_wheel_holds_the_kernels_and_fits_every_python(distributions):
    wheel = distributions[1]
    python, abi, platform = wheel.stem.split("-")[2:]
    assert (python, abi) == ("py3", "none") and platform != "any" and not platform.startswith("linux")
    with zipfile.ZipFile(wheel) as archive:
        assert "torch_sinkhorn_attn/engines/_cpu.so" in archive.namelist()
        serves = archive.read("torch_sinkhorn_attn/engines/_cpu_torch.txt").decode().strip()
    assert releases.among(serves)


def build(target, **environment):
    """Build the package alone, without the sdist, into `target`."""
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", target, "--build-temp", f"{target}-temp"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "/nowhere/c++"}, "the C++ compiler '/nowhere/c++' was not found when the package was built"),
        ({"TORCH_SINKHORN_ATTN_BUILD_CPU": "0"}, "the package was built with TORCH_SINKHORN_ATTN_BUILD_CPU=0"),
        ({"CXX": "false"}, "when the package was built: "),
    ],
)
def test_without_the_kernels_it_installs_and_says_why(tmp_path, environment, reason):
    done = build(tmp_path / "lib", **environment)
    assert done.returncode == 0, done.stderr
    assert 'engine "cpu" is left out' in done.stderr and reason in done.stderr
    program = """
import torch, torch_sinkhorn_attn as package, warnings
x = torch.randn(1, 4, 3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert package.sinkhorn_attention(x, x, x, engine="tiled").shape == x.shape and not caught
    module = package.SinkhornMultiheadAttention(3, 1)
    for _ in range(2):
        module(x, x, x)
        package.sinkhorn_attention(x, x, x)
(warning,) = caught
print(warning.filename, warning.lineno, warning.category.__name__, warning.message)
try:
    package.sinkhorn_attention(x, x, x, engine="cpu")
except ValueError as error:
    print(error)
"""
    said = run("-c", program, cwd=tmp_path, path=[tmp_path / "lib"])
    assert said.count(reason) == 2 and said.count("To build them: pip install . in the source folder") == 2
    assert said.startswith("<string> 9 MissingKernelsWarning engine='tiled' computes CPU tensors here, some ten times")


def test_the_kernels_can_be_demanded(tmp_path):
    done = build(tmp_path / "lib", CXX="/nowhere/c++", TORCH_SINKHORN_ATTN_BUILD_CPU="1")
    assert done.returncode != 0 and "was not built: the C++ compiler '/nowhere/c++' was not found" in done.stderr


@pytest.mark.slow
def test_wheel_requires_the_torch_it_was_tested_with(distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        (metadata,) = (wheel.read(name).decode() for name in wheel.namelist() if name.endswith("/METADATA"))
    required = set(map(str, map(Requirement, re.findall("^Requires-Dist: (.*)$", metadata, flags=re.M))))
    assert "torch>=2.9" in required
    assert 'torch_xla[pallas,tpu]==2.9.0; extra == "tpu"' in required
    assert {'torch_tpu>=0.2; extra == "torchtpu"', 'jax>=0.10; extra == "torchtpu"'} <= required


@pytest.mark.slow
def test_installed_wheel_runs_elsewhere(installed, tmp_path):
    program = """
import importlib.metadata, torch, torch_sinkhorn_attn as package
query, key = torch.randn(2, 1, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
plan = package.sinkhorn_plan(query, key, epsilon=2.0, base_iters=200)
output = package.sinkhorn_attention(query, key, key, epsilon=2.0, base_iters=200)
torch.testing.assert_close(plan.sum(-1), torch.ones(1, 2, 5, dtype=torch.float64))
torch.testing.assert_close(plan.sum(-2), torch.ones(1, 2, 5, dtype=torch.float64))
torch.testing.assert_close(output, plan @ key)
print(package.__file__, package.__version__, importlib.metadata.version("torch_sinkhorn_attn"), sep="\\n")
"""
    file, *versions = run("-c", program, cwd=tmp_path, path=[installed]).split()
    assert Path(file).parent == installed / "torch_sinkhorn_attn"
    assert versions == [torch_sinkhorn_attn.__version__] * 2


@pytest.mark.slow
def test_readme_code_runs_with_the_installed_wheel(installed, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    assert blocks
    program = "\n".join(block for block in blocks if ">>>" not in block)  # those with prompts run as doctests
    run("-c", program, cwd=tmp_path, path=[installed])


@pytest.mark.slow
def test_import_is_light(tmp_path):
    """Stand-ins for what may not be installed here, so that an attempt to import it shows."""
    for name in ("jax", "jaxlib", "torch_tpu", "torch_xla", "transformers"):
        (tmp_path / f"{name}.py").touch()
    program = """
import sys, torch
before = set(sys.modules)
import torch_sinkhorn_attn
from torch_sinkhorn_attn.compat import releases
print(*{name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)
"""
    assert run("-c", program, cwd=tmp_path, path=[tmp_path, ROOT]).split() == ["torch_sinkhorn_attn"]


def test_init_is_short():
    lines = (ROOT / "torch_sinkhorn_attn/__init__.py").read_text().splitlines()
    assert len(lines) <= 64  # every name stands there three times


def test_citation_names_this_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {torch_sinkhorn_attn.__version__}\n" in citation
    assert "2605.08123" in citation


def pins():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_requirements_are_exact():
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in pins())
    assert "torch==2.9.0" in map(str, pins())


def test_requirements_are_complete():
    """Whatever a pinned package requires is pinned too; torch itself pins triton and NVIDIA's libraries."""
    pinned = {canonicalize_name(pin.name) for pin in pins() if pin.marker is None or pin.marker.evaluate()}
    extras = {"torch-xla": ("", "tpu", "pallas")}
    for name in pinned:
        for needed in map(Requirement, importlib.metadata.requires(name) or ()):
            wanted = extras.get(name, ("",))
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in wanted):
                exact = name == "torch" and str(needed.specifier).startswith("==")
                assert exact or canonicalize_name(needed.name) in pinned, f"{name} requires {needed}"
