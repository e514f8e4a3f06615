"""Two gloo processes on the CPU, DistributedDataParallel and FSDP2: the losses of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from marks import slow_after

PROGRAM = """
import os, sys, warnings
import torch, torch.distributed as dist
from torch import nn
from torch_sinkhorn_attn import replace_attention, SinkhornMultiheadAttention

kind, rank, store, dustbin = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] == "True"
warnings.simplefilter("ignore")
torch.set_num_threads(1)
torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
model = nn.Sequential()
model.body = nn.TransformerEncoder(layer, 2)
report = replace_attention(model, window=(5, 5), dustbin=dustbin)
assert len(report.replaced) == 2
data, target = torch.randn(2, 8, 12, 16)
ignore = torch.arange(12) >= torch.randint(4, 13, (8, 1))

if kind == "one":
    own, trained = slice(None), model.body
else:
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
    own = slice(4 * rank, 4 * rank + 4)
    if kind == "ddp":
        trained = nn.parallel.DistributedDataParallel(model.body)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.body.layers:
            if kind == "fsdp attention":
                fully_shard(layer.self_attn, mesh=mesh)
            fully_shard(layer, mesh=mesh)
        fully_shard(model.body, mesh=mesh)
        trained = model.body
optimizer = torch.optim.SGD(trained.parameters(), lr=0.2, momentum=0.9)
for step in range(6):
    out = trained(data[own], src_key_padding_mask=ignore[own])
    # every process's loss is the mean over its samples, and gradients are averaged over processes
    loss = (out - target[own]).masked_fill(ignore[own][..., None], 0).square().mean((1, 2)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    total = loss.detach().clone()
    if kind != "one":
        dist.all_reduce(total)
        total /= 2
    if rank == 0:
        print(f"loss {total.item():.6f}", flush=True)
if kind != "one":
    dist.destroy_process_group()
"""


def losses(kind: str, dustbin: bool, folder: Path) -> list[float]:
    """Six training losses of the global batch."""
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    store = folder / f"store {kind}"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, kind, str(rank), str(store), str(dustbin)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(1 if kind == "one" else 2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=240) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert all(process.returncode == 0 for process in ranks), outputs
    return [float(line.split()[1]) for line in outputs[0][0].splitlines() if line.startswith("loss ")]


@pytest.mark.slow
@pytest.mark.parametrize("dustbin", slow_after(1, [True, False], {False}))
def test_losses_are_those_of_one_process(dustbin: bool, tmp_path: Path) -> None:
    truth = losses("one", dustbin, tmp_path)
    assert len(truth) == 6 and abs(truth[-1] - truth[0]) > 1e-2
    for kind in ("ddp", "fsdp", "fsdp attention"):
        found = losses(kind, dustbin, tmp_path)
        assert max(abs(a - b) for a, b in zip(found, truth, strict=True)) < 2e-5, kind


def test_a_dustbin_added_to_a_wrapped_model_is_refused() -> None:
    import torch.distributed as dist
    from torch import nn

    from torch_sinkhorn_attn import replace_attention

    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.MultiheadAttention(16, 4))
        with pytest.raises(ValueError, match=r"dustbin=True adds parameters.*then wrap the model"):
            replace_attention(wrapped, dustbin=True)
        assert replace_attention(wrapped).replaced == ("module",)
    finally:
        dist.destroy_process_group()
