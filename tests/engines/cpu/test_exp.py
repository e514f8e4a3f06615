"""The kernels' own exp, in every instruction set of this processor: within 1.1 ulp, and right where it is special."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import mpmath
import numpy as np
import pytest

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "build_backend"))
from sinkhorn_build import FLAGS, instruction_sets  # noqa: E402

from torch_sinkhorn_attn.engines import cpu  # noqa: E402

SETS = instruction_sets(platform.machine())
COMPILER = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()
DTYPES = ("float32", "float64")
LIMIT_ULPS = 1.1
LIMIT = {"float32": (-87.3, 88.7), "float64": (-708.3, 709.7)}  # within which every result is normal and finite


@pytest.fixture(scope="module", params=SETS)
def exp(request, tmp_path_factory):
    """exp of an array, by the vectors of one instruction set."""
    name = request.param
    if cpu.unavailable() is not None or name.lower() not in cpu.capabilities():
        pytest.skip(f"this processor does not run {name}")
    if shutil.which(COMPILER[0]) is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path_factory.mktemp("exp") / name
    flags = [*FLAGS, *SETS[name], f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}"]
    command = [COMPILER[0], *flags, f"-I{ROOT / 'csrc'}", ROOT / "tests/engines/cpu/exp.cpp", "-o", program]
    subprocess.run(command, check=True)

    def of(x):
        padded = np.concatenate([x, np.zeros(-len(x) % 16, x.dtype)])
        done = subprocess.run([program, str(x.dtype)], input=padded.tobytes(), stdout=subprocess.PIPE, check=True)
        return np.frombuffer(done.stdout, x.dtype)[: len(x)]

    return of


def ulps(found, x):
    """How far each result is from the true value, in units of the last place there."""
    with mpmath.workprec(140):
        true = [mpmath.exp(mpmath.mpf(float(v))) for v in x]
        step = np.spacing(np.array([float(t) for t in true], found.dtype))
        return np.array([float(abs(mpmath.mpf(float(f)) - t) / float(s)) for f, t, s in zip(found, true, step)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_exp_is_accurate(exp, dtype):
    r = np.random.default_rng(0)
    low, high = LIMIT[dtype]
    half = np.log(2) * (np.arange(int(low / np.log(2)) + 1, int(high / np.log(2))) + 0.5)  # where n turns to the next
    ranges = [r.uniform(low, high, 4000), r.uniform(-1, 1, 4000), r.normal(size=2000) * 1e-5, half, half * (1 + 1e-7)]
    x = np.concatenate(ranges).astype(dtype)
    found = ulps(exp(x), x)
    assert found.max() < LIMIT_ULPS, (found.max(), x[found.argmax()])


@pytest.mark.parametrize("dtype", DTYPES)
def test_exp_at_the_ends_of_its_range(exp, dtype):
    """Beside the last argument with a finite result, and the first with a normal one."""
    info = np.finfo(dtype)
    with mpmath.workprec(140):
        top = np.array([float(mpmath.log(mpmath.mpf(float(info.max))))], dtype)[0]
        bottom = np.array([float(mpmath.log(mpmath.mpf(float(info.tiny))))], dtype)[0]
        near = [top, bottom]
        for edge in (top, bottom):
            for direction in (-np.inf, np.inf):
                x = edge
                for _ in range(4):
                    x = np.nextafter(x, np.array(direction, dtype)[()])
                    near.append(x)
        x = np.array(near, dtype)
        true = [mpmath.exp(mpmath.mpf(float(v))) for v in x]
        finite = np.array([t <= mpmath.mpf(float(info.max)) for t in true])
        normal = np.array([t >= mpmath.mpf(float(info.tiny)) for t in true])
    found = exp(x)
    assert (np.isposinf(found) == ~finite).all() and (found[~normal] == 0).all(), found
    inside = finite & normal
    assert inside.sum() >= 8 and ulps(found[inside], x[inside]).max() < LIMIT_ULPS


@pytest.mark.parametrize("dtype", DTYPES)
def test_exp_of_special_numbers(exp, dtype):
    info = np.finfo(dtype)
    tiny = info.smallest_subnormal
    x = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, tiny, -tiny, info.tiny, info.max, -info.max, 1e4, -1e4]
    x = np.array(x, dtype)
    wanted = np.array([np.nan, np.nan, np.inf, 0, 1, 1, 1, 1, 1, np.inf, 0, np.inf, 0], dtype)
    np.testing.assert_array_equal(exp(x), wanted)
    assert not np.signbit(exp(x)[[3, 10, 12]]).any()
