"""Existence of a plan, decided by the library and by linear programs (HiGHS), on random masks in random token order.

    PYTHONPATH=.:tests python benchmarks/feasibility.py [count] [first seed]

Masses: small integers (ties), uniform, over twelve decades, and sums of plans. Every problem is asked three times: as
drawn, with queries and keys permuted, and with sides exchanged. Exits non-zero on a mismatch. The oracles are those of
`tests/cuts.py`, whose cuts are judged in exact fractions.
"""

from __future__ import annotations

import sys
from collections import Counter

import cuts
import torch
from torch import Tensor

from torch_sinkhorn_attn import sinkhorn_plan


def accepts(keep: Tensor, a: Tensor, b: Tensor) -> bool:
    x = torch.zeros(1, max(keep.shape), 1)
    try:
        sinkhorn_plan(x[:, : len(a)], x[:, : len(b)], keep, row_mass=a, col_mass=b, base_iters=0)
    except ValueError:
        return False
    return True


def main(count: int = 2000, first: int = 0) -> int:
    torch.set_num_threads(1)
    seen: Counter[tuple[str, bool]] = Counter()
    mismatches = 0
    for seed in range(first, first + count):
        kind, keep, a, b = cuts.draw(seed)
        g = torch.Generator().manual_seed(seed)
        rows, cols = (torch.randperm(n, generator=g) for n in keep.shape)
        truth = cuts.has_plan_by_programs(keep, a, b)
        seen[kind, truth] += 1
        found = accepts(keep, a, b), accepts(keep[rows][:, cols], a[rows], b[cols]), accepts(keep.T, b, a)
        if found != (truth,) * 3:
            mismatches += 1
            print(f"seed {seed} ({kind}): linear programs say {truth}, the library {found}")
    for (kind, truth), number in sorted(seen.items()):
        print(f"{kind:24s} {'plan' if truth else 'no plan':8s} {number}")
    print(f"{count} problems, {mismatches} mismatches")
    return int(mismatches > 0)


if __name__ == "__main__":
    raise SystemExit(main(*(int(x) for x in sys.argv[1:])))
