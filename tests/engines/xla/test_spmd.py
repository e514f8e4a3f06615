"""Attention over several devices: the values of one device, and results that lie where the query lies.

Each test is a process of its own, for XLA:CPU counts its devices once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch_xla")
pytest.importorskip("jax")
pytestmark = pytest.mark.slow

PRELUDE = """
import numpy as np, torch, torch_xla, torch_xla.runtime as xr, torch_xla.distributed.spmd as xs
from torch_xla import _XLAC
from conformance import relative_error
from torch_sinkhorn_attn import Dustbin, SinkhornMultiheadAttention, sinkhorn_attention
from torch_sinkhorn_attn.engines.xla import set_lowering, spmd
from torch_sinkhorn_attn.problem import arguments

torch.set_num_threads(1)
xr.use_spmd()
device, count = torch_xla.device(), xr.global_runtime_device_count()
mesh = xs.Mesh(np.arange(count), (2, count // 2), ("data", "fsdp"))
words = torch.tensor([123456789, 3987654321])
arguments.dropout_seed = lambda p, device: words.to(device) if p else None

def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

def where(x):
    return _XLAC._get_xla_sharding_spec(x)

def on(x):
    return x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x

def compare(batch, heads, shape=(4, 4, 16, 8), key_heads=None, mark=True, mask=None, **options):
    num, query_heads, length, width = shape
    key_heads = key_heads or query_heads
    shapes = [(num, n, length, width) for n in (query_heads, key_heads, key_heads)]
    here = [randn(*shape, seed=s).requires_grad_() for s, shape in enumerate(shapes)]
    there = [on(x) for x in here]
    if mark:
        xs.mark_sharding(there[0], mesh, (batch, heads, None, None))
    if mask is not None:
        here.append(mask.requires_grad_())
        there.append(on(mask))
    weight = randn(*shape, seed=9)
    expected = sinkhorn_attention(*here, enable_gqa=True, engine="cpu", **options)
    truth = torch.autograd.grad((expected * weight).sum(), here)
    found = sinkhorn_attention(*there, enable_gqa=True, **{k: on(x) for k, x in options.items()})
    gradients = torch.autograd.grad((found * on(weight)).sum(), there)
    assert "manual" in _XLAC._get_xla_tensors_hlo([found, *gradients])
    torch_xla.sync()
    assert mark is False or where(found) == where(gradients[0]) == where(there[0]) != "", where(found)
    for x, y in ((found, expected), *zip(gradients, truth)):
        assert relative_error(x.detach().cpu(), y) < 2e-6, (batch, heads, list(options), relative_error(x.cpu(), y))
    return found
"""


def run(program: str, devices: int = 4) -> None:
    environment = os.environ | {"CPU_NUM_DEVICES": str(devices), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[3])])
    done = subprocess.run([sys.executable, "-c", PRELUDE + program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


def test_along_batch_and_heads_with_lengths_segments_and_dropout() -> None:
    run("""
lengths = torch.tensor([3, 16, 11, 7])
compare(("data", "fsdp"), None, query_lengths=lengths, key_lengths=lengths)
ids = (torch.arange(16) // 6).expand(4, 16).contiguous()
compare("data", "fsdp", query_segment_ids=ids, key_segment_ids=ids, dropout_p=0.3)
compare("fsdp", None, window=(4, 4), dustbin=Dustbin(0.3, 0.1))
""")


@pytest.mark.exhaustive
def test_grouped_queries_and_masks_over_heads() -> None:
    run("""
compare("data", "fsdp", key_heads=1, mask=randn(16, 16, seed=4))
compare("data", "fsdp", key_heads=2, mask=randn(4, 1, 16, 16, seed=4))
""")


@pytest.mark.exhaustive
def test_eight_devices_and_a_batch_that_they_do_not_divide() -> None:
    run(
        """
lengths = torch.tensor([5, 12, 16, 1, 7, 9])
options = {"query_lengths": lengths, "key_lengths": lengths, "mask": randn(6, 1, 16, 16)}
with spmd.sharding(mesh, batch=("data", "fsdp")):
    found = compare(None, None, (6, 2, 16, 4), mark=False, **options)
assert "devices=[8,1,1,1]" in where(found), where(found)
""",
        devices=8,
    )


def test_what_says_how_query_is_sharded() -> None:
    run("""
from pytest import raises
q = on(randn(4, 2, 8, 4)) * 1  # still to be computed: it has no annotation
assert spmd.placement(q) is None
spmd.set_sharding(mesh, "data", "fsdp")
assert spmd.placement(q) == spmd.Placement((2, 2, 1, 1), (0, 1, 2, 3))
with spmd.sharding(mesh, ("fsdp", "data")):
    assert spmd.placement(q) == spmd.Placement((4, 1, 1, 1), (0, 2, 1, 3))
spmd.set_sharding(None)
assert spmd.placement(q) is None
xs.set_global_mesh(mesh)
assert spmd.placement(q) == spmd.Placement((4, 1, 1, 1), (0, 1, 2, 3))
with spmd.sharding(mesh):
    assert spmd.placement(q) == spmd.Placement((1, 1, 1, 4), (0, 1, 2, 3))
xs.set_global_mesh(None)
tokens = on(randn(4, 2, 8, 4))
xs.mark_sharding(tokens, mesh, (None, None, "data", None))
assert spmd.placement(tokens) == spmd.Placement((1, 1, 2, 2), (0, 1, 2, 3))
with spmd.sharding(mesh, "data"):
    output = sinkhorn_attention(tokens, tokens, tokens)
assert relative_error(output.cpu(), sinkhorn_attention(*[tokens.cpu()] * 3)) < 2e-6
with raises(ValueError, match="query has 2 heads, which 4 shards do not divide"):
    with spmd.sharding(mesh, heads=("data", "fsdp")):
        sinkhorn_attention(q, q, q)
with raises(ValueError, match="names 'model', which the mesh has not"):
    spmd.set_sharding(mesh, "model")
with raises(ValueError, match="name an axis twice"):
    spmd.set_sharding(mesh, "data", "data")
set_lowering("streaming", interpret=True)
with raises(ValueError, match="nothing says how query is sharded"):
    sinkhorn_attention(q, q, q)
for text in ("<=[2,2]T(1,0)}", "0,2,1,3 last_tile_dim_replicate}"):
    assert spmd._devices(text, 4) == (0, 2, 1, 3)
""")


def test_a_kernel_in_shards() -> None:
    run("""
from torch_sinkhorn_attn.engines.xla import binding
assert binding.device_kind() == "TPU v6e"  # of the environment: the device of SPMD has none
set_lowering("streaming", interpret=True)
lengths = torch.tensor([3, 16, 11, 7])
compare("data", "fsdp", (4, 2, 16, 8), query_lengths=lengths, key_lengths=lengths, base_iters=3)
""")


def test_a_module_in_fsdp() -> None:
    """Parameters sharded over fsdp, the batch over (data, fsdp): the loss and the gradients of one device."""
    run("""
from torch_xla.experimental.spmd_fully_sharded_data_parallel import SpmdFullyShardedDataParallel

class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = SinkhornMultiheadAttention(16, 2, batch_first=True, window=(6, 6))

    def forward(self, x, pad):
        return self.attention(x, x, x, key_padding_mask=pad, need_weights=False)[0]

torch.manual_seed(0)
here, there = Encoder(), Encoder()
there.load_state_dict(here.state_dict())
xs.set_global_mesh(mesh)
wrapped = SpmdFullyShardedDataParallel(there, mesh=mesh, extra_data_axis="data")
assert "devices=" in where(there.attention.in_proj_weight)
for seed in range(2):
    x, pad = randn(4, 24, 16, seed=seed), torch.arange(24) >= torch.tensor([[5], [24], [17 + seed], [9]])
    mine, padding = on(x), on(pad)
    xs.mark_sharding(mine, mesh, (("data", "fsdp"), None, None))
    output, expected = wrapped(mine, padding), here(x, pad)
    for module, y in ((wrapped, output), (here, expected)):
        module.zero_grad()
        y.square().mean().backward()
    gradients = [p.grad for p in wrapped.parameters()]
    assert "manual" in _XLAC._get_xla_tensors_hlo([output, *gradients])
    torch_xla.sync()
    assert where(output) == "{devices=[4,1,1]0,1,2,3}"
    assert relative_error(output.cpu(), expected) < 2e-6
    for g, p in zip(gradients, here.parameters()):
        assert relative_error(g.cpu(), p.grad) < 2e-6
""")
