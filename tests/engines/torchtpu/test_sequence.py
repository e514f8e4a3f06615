"""Tokens along an axis of TorchTPU's mesh: the registered functions on four virtual devices, the numbers of one; and
how they are bound, on a stand-in of one rank."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import relative_error
from marks import FAST
from torch import Tensor

from torch_sinkhorn_attn import Dustbin, certify, sinkhorn_attention, sinkhorn_plan
from torch_sinkhorn_attn.engines import torchtpu

jax = pytest.importorskip("jax")

import torchtpu_standin as standin  # noqa: E402  it imports jax

from torch_sinkhorn_attn.engines.torchtpu import binding, mesh  # noqa: E402

D = torch.float64


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["band, dustbin, dropout", pytest.param("full, mask, masses", marks=pytest.mark.exhaustive)]
)
def test_four_devices_are_one(name: str) -> None:
    """Output, aux, gradients; the batch lies along another axis; float64, 1e-10."""
    script, tests = Path(__file__).with_name("sequence.py"), Path(__file__).parents[2]
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {FAST}", "NPROC": "16",
        "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}",
    }  # fmt: skip
    done = subprocess.run([sys.executable, str(script), name], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "agrees on 4 devices\n", done.stderr[-3000:]


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A mesh of this rank alone, its tokens along "cp"."""
    standin.install(monkeypatch)
    place = mesh.Place(jax.make_mesh((1,), ("cp",)), None, None, "cp")
    monkeypatch.setattr(mesh, "_place", place)
    yield
    torchtpu.set_lowering()
    binding.op.cache_clear()
    binding.sharded_op.cache_clear()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D).requires_grad_()


@pytest.mark.slow
def test_it_is_bound_with_its_derivative(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (randn(2, 2, 9, 4, seed=seed) for seed in range(3))
    score, lengths = randn(2, 1, seed=3), torch.tensor([9, 5])
    options: dict[str, Any] = {
        "query_lengths": lengths, "key_lengths": lengths, "window": (4, 4), "base_iters": 3, "return_aux": True,
        "dustbin": Dustbin(score, 0.3), "initial_potentials": (torch.zeros(2, 2, 10, dtype=D), randn(10).detach()),
    }  # fmt: skip
    found = []
    for place in (mesh.placement(), None):
        monkeypatch.setattr(mesh, "_place", place)
        if place is None:
            options["engine"] = "reference"
        output, aux = sinkhorn_attention(q, k, v, **options)
        loss = (output * randn(*output.shape, seed=5).detach()).sum() + aux.row_dustbin.square().sum()
        found.append([output, *aux, *torch.autograd.grad(loss, [q, k, v, score])])
        assert not any(x.requires_grad for x in aux[:4])
    for x, y in zip(*found, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype and relative_error(x, y) < 1e-10


def test_what_is_refused(one_rank: None) -> None:
    q = randn(1, 2, 8, 4)
    with pytest.raises(ValueError, match="engine='cpu' does not know the other ranks' tokens"):
        sinkhorn_attention(q, q, q, engine="cpu")
    with pytest.raises(ValueError, match="key=None is not taken with a sharded sequence"):
        sinkhorn_attention(torch.zeros(1, 2, 8, 8, dtype=D), None, q)
    with pytest.raises(TypeError, match="dustbin must be a Dustbin or None, got 3"):
        sinkhorn_attention(q, q, q, dustbin=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="row_mass requires grad, but it is a constant"):
        sinkhorn_attention(q, q, q, row_mass=torch.ones(8, dtype=D, requires_grad=True))
    for function in (lambda: sinkhorn_plan(q, q), lambda: certify(q, q)):
        with pytest.raises(ValueError, match="With the sequence sharded over ranks"):
            function()


def test_an_axis_of_a_mesh_has_one_use() -> None:
    with pytest.raises(ValueError, match="sequence='x' is not an axis of the mesh"):
        mesh.set_sharding({"data": 4}, batch="data", sequence="x")
    with pytest.raises(ValueError, match="heads and sequence both name 'data'; give each axis of the mesh one use"):
        mesh.set_sharding({"data": 4}, heads="data", sequence="data")
