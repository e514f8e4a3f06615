"""Tokens of a problem over several devices of torch_xla: the numbers of one (`tests/xla_sequence.py` has the cases), on
virtual CPU devices, in a process of its own that has that many; refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from marks import FAST

pytest.importorskip("torch_xla")
pytest.importorskip("jax")
TESTS = Path(__file__).parents[2]
CASES = (
    "band, dustbin, ragged", "band", "band, lengths", "band, segments, dropout", "band, rectangular",
    "full, mask of one row", "full, masses", "full, mask, a row or none", "full, mask, segments, ragged",
)  # fmt: skip
IN_MAKE_TEST = {(4, CASES[0]), (4, CASES[-2]), (3, CASES[-1])}


def in_a_process(arguments: list[str], devices: int) -> str:
    environment = os.environ | {"CPU_NUM_DEVICES": str(devices), "OMP_NUM_THREADS": "1", "XLA_FLAGS": FAST}
    environment |= {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "NPROC": "16"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


def cases() -> list[Any]:
    found = []
    for devices in (2, 3, 4, 8):
        for name in CASES:
            rest = [pytest.mark.exhaustive] * ((devices, name) not in IN_MAKE_TEST)
            found.append(pytest.param(devices, name, marks=[pytest.mark.slow, *rest]))
    return found


@pytest.mark.parametrize(("devices", "name"), cases())
def test_tokens_over_devices(devices: int, name: str) -> None:
    """Output, aux and all gradients, float64, 1e-10; a band sends to neighbours, anything else gathers."""
    told = in_a_process([str(TESTS / "xla_sequence.py"), name], devices)
    wide = devices == 8 and "mask" not in name  # halos of neighbours would be more than all
    assert "collective-permute" in told or wide or name.startswith("full"), told


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("devices", [2, 3, 4, 8])
def test_random_problems(devices: int) -> None:
    in_a_process([str(TESTS / "xla_sequence.py"), f"{100 * devices}:25"], devices)


REFUSALS = """
import numpy as np, torch, torch_xla, torch_xla.runtime as xr, torch_xla.distributed.spmd as xs
from pytest import raises
from torch_sinkhorn_attn import sinkhorn_attention
from torch_sinkhorn_attn.engines.xla import spmd

xr.use_spmd()
mesh = xs.Mesh(np.arange(4), (2, 2), ("data", "cp"))
q, features = (torch.randn(4, 3, 8, 4).to(torch_xla.device()) for _ in range(2))
xs.mark_sharding(features, mesh, (None, None, None, "cp"))
with raises(ValueError, match="lies on a grid of .1, 1, 1, 2. devices: the features of a token must stay on one"):
    sinkhorn_attention(features, features, features)
with raises(ValueError, match="sequence='model' names 'model', which the mesh has not; its axes are .'data', 'cp'."):
    spmd.set_sharding(mesh, sequence="model")
with raises(ValueError, match="batch='cp', heads=None and sequence='cp' name an axis twice"):
    spmd.set_sharding(mesh, "cp", sequence="cp")
with raises(ValueError, match="query has 3 heads, which 2 shards do not divide"):
    with spmd.sharding(mesh, heads="data", sequence="cp"):
        sinkhorn_attention(q, q, q)
mixed = xs.Mesh(np.array([0, 3, 1, 2]), (4,), ("cp",))
with raises(ValueError, match="no order of these counts them; make the mesh of numpy.arange"):
    with spmd.sharding(mixed, sequence="cp"):
        sinkhorn_attention(q, q, q)
three = xs.Mesh(np.arange(4), (2, 2, 1), ("cp", "data", "model"))
place = spmd._placement(three, "data", "model", "cp")
assert place == spmd.Placement((2, 1, 2, 1), (0, 2, 1, 3)), place
assert [x for x in spmd.axes_in_order(place) if x[1] > 1] == [(2, 2), (0, 2)]
"""


@pytest.mark.slow
def test_what_is_refused() -> None:
    in_a_process(["-c", REFUSALS], 4)
