"""Training on a sequence of which every process holds a part."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing.spawn import spawn

from examples.long_sequence.genome import genome, masked
from examples.long_sequence.model import Encoder
from torch_sinkhorn_attn.distributed import sequence_parallel


def train(tokens: int, steps: int, device: torch.device, group: dist.ProcessGroup | None) -> list[float]:
    """Losses of the whole sequence, of which this process holds the group's share."""
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    torch.manual_seed(0)
    model = Encoder().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    position = torch.arange(tokens, device=device).tensor_split(size)[rank]
    bases, losses = genome(tokens, seed=1).to(device), []
    for step in range(steps):
        given, hidden = (x.to(device) for x in masked(bases.cpu(), seed=step))
        count = hidden.sum()
        given, hidden, own = (x.tensor_split(size)[rank] for x in (given, hidden, bases))
        with sequence_parallel(group):
            logits = model(given[None], position)[0]
        loss = F.cross_entropy(logits[hidden], own[hidden], reduction="sum") / count
        optimizer.zero_grad()
        loss.backward()
        total = loss.detach()
        if group is not None:  # this process has its own tokens' part of the loss and of every gradient
            for x in (total, *(p.grad for p in model.parameters())):
                dist.all_reduce(x, group=group)
        optimizer.step()
        losses.append(total.item())
    return losses


def _rank(rank: int, size: int, folder: str, tokens: int, steps: int) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    losses = train(tokens, steps, torch.device("cpu"), dist.group.WORLD)
    if rank == 0:
        torch.save(losses, Path(folder) / "losses.pt")
    dist.destroy_process_group()


def spread(ranks: int, tokens: int, steps: int) -> list[float]:
    """The losses of so many processes of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (ranks, folder, tokens, steps), nprocs=ranks)
        found: list[float] = torch.load(Path(folder) / "losses.pt")
    return found


def under_torchrun(tokens: int, steps: int) -> None:
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    losses = train(tokens, steps, device, dist.group.WORLD)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes: losses {losses[0]:.6f} to {losses[-1]:.6f}")
    dist.destroy_process_group()
