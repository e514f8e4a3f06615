"""A few problems for the thread sanitizer (`make races`): shared and whole, many callers, more threads than cores."""

from __future__ import annotations

import threading

import torch
import torch.distributed as dist

from torch_sinkhorn_attn import Dustbin, sinkhorn_attention, sinkhorn_plan


def step(length: int, heads: int = 3, **options) -> None:
    g = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, heads, length, 16, generator=g).requires_grad_() for _ in range(3))
    out = sinkhorn_attention(q, k, v, engine="cpu", base_iters=4, **options)
    torch.autograd.grad(out.sin().sum(), (q, k, v))


def main() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mask = torch.randn(600, 600).requires_grad_()
    shared = ({}, {"window": (200, 200)}, {"dustbin": Dustbin(0.0, 0.0)}, {"gradient": "implicit"}, {"attn_mask": mask})
    for threads in (2, 3, 9, 17):
        torch.set_num_threads(threads)
        for options in shared:
            step(600, **options)
            step(600, sequence_group=dist.group.WORLD, **options)
        step(100, heads=12)
        sinkhorn_plan(*torch.randn(2, 1, 2, 500, 8), engine="cpu", dustbin=Dustbin(0.0, 0.0))
    callers = [threading.Thread(target=step, args=(500,)) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
