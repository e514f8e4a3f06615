"""What each kind of problem needs: iterations with and without acceleration, and how far the tail's gradient is off.

    python benchmarks/choosing.py [--tokens 256] [--out docs/figures/choosing.json]

Gaussian queries and keys of 32 features. `iterations` is T + R until no column is off by more than 1 % of its share,
plain and accelerated; `gap` is ||tail - implicit|| / ||implicit|| of the gradients of query and key at that many, R = 2
and 8. docs/choosing.md shows it; benchmarks/costs.py has what iterations cost.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from lib.measure import print_rows

from torch_sinkhorn_attn import choose_settings, residual_history
from torch_sinkhorn_attn.choosing import MOST, gradient_gap

EPSILONS = (2.0, 1.0, 0.5, 0.25, 0.1, 0.05)
HEAD = ("kind", "epsilon", "plain", "accelerated", "gap R=2", "R=8", "chosen")
WIDTHS = (-14, 7, 6, 11, 8, 8, -82)


def kinds(tokens: int) -> dict[str, dict[str, Any]]:
    g = torch.Generator().manual_seed(1)
    half = torch.full((1,), tokens // 2)
    mass = torch.rand(tokens, generator=g).mul(2).exp()
    return {
        "dense": {},
        "banded": {"window": (tokens // 8, tokens // 8)},
        "padded": {"query_lengths": half, "key_lengths": half * 3 // 2},
        "unequal masses": {"row_mass": mass / mass.mean()},
    }


def measure(tokens: int, options: dict[str, Any]) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 4, tokens, 32, generator=g) for _ in range(2))
    found: dict[str, Any] = {}
    for name, acceleration in (("plain", None), ("accelerated", "chebyshev")):
        history = residual_history(q, k, base_iters=MOST - 2, acceleration=acceleration, **options)
        worst = history.flatten(0, -2).amax(0)
        reached = (worst <= 0.01).nonzero()
        found[name] = int(reached[0]) + 1 if len(reached) else None
        found[f"{name} errors"] = [round(x, 8) for x in worst[[0, 2, 4, 9, 21, 41, 81, 161, MOST - 1]].tolist()]
    if found["plain"] or found["accelerated"]:
        base = (found["plain"] or found["accelerated"]) - 2
        accelerated = {"acceleration": None if found["plain"] else "chebyshev"}
        for tail in (2, 8):
            setting = {**options, **accelerated, "base_iters": max(base, 1), "tail_iters": tail}
            found[f"gap {tail}"] = gradient_gap((q, k, None), setting)
    chosen = choose_settings(q, k, **options)
    found["chosen"] = str(chosen).partition(":")[0] if chosen.balanced else "none of 320 iterations"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--out", type=Path, help="where the numbers go, as JSON")
    arguments, _ = parser.parse_known_args()
    table: dict[str, dict[str, Any]] = {}
    rows = []
    for kind, options in kinds(arguments.tokens).items():
        for epsilon in EPSILONS:
            found = measure(arguments.tokens, {**options, "epsilon": epsilon})
            table.setdefault(kind, {})[str(epsilon)] = found
            gaps = [f"{100 * found[x]:.2g} %" if x in found else "-" for x in ("gap 2", "gap 8")]
            counts = [str(found[x] or "> 320") for x in ("plain", "accelerated")]
            rows.append([kind, f"{epsilon:g}", *counts, *gaps, found["chosen"]])
    print_rows([HEAD, *rows], WIDTHS)
    if arguments.out:
        arguments.out.write_text(json.dumps({"tokens": arguments.tokens, "kinds": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
