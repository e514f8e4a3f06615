"""What a certificate costs, and what its quick rate says, beside the call that it is about.

    python benchmarks/certify.py [--threads 2] [--lengths 2048 4096 8192] [--exact 4096] [--repeat 3]

Times are in forward passes of the same call (d = 64, one head, float32, T = 20, R = 2), the best of `repeat` rounds in
which all take turns; `quick` is without advice, which a balanced plan costs nothing, and `+ advice` with it. The exact
mode is left out beyond `--exact` tokens. `balance` is the largest |log(column sum / b)|, and what the advice says is
printed below.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from lib.measure import best_times, print_rows

from torch_sinkhorn_attn import Certificate, certify, residual_history, sinkhorn_attention

HEAD = (
    "tokens",
    "support",
    "epsilon",
    "forward ms",
    "quick",
    "+ advice",
    "history",
    "exact",
    "balance",
    "rate",
    "exact",
)
WIDTHS = (6, 10, 7, 10, 6, 8, 7, 6, 8, 9, 9)
CASES: list[dict[str, Any]] = [{}, {"epsilon": 0.1}, {"window": (128, 128)}, {"window": (128, 128), "epsilon": 0.1}]


def row(length: int, options: dict[str, Any], repeat: int, with_exact: bool) -> tuple[list[str], str]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, length, 64, generator=g) for _ in range(3))
    told: list[Certificate] = []
    runs: dict[str, Callable[[], object]] = {
        "forward": lambda: sinkhorn_attention(q, k, v, **options),
        "quick": lambda: certify(q, k, mode="quick", advise=False, **options),
        "advice": lambda: told.append(certify(q, k, mode="quick", **options)),
        "history": lambda: residual_history(q, k, **options),
    }
    seconds = best_times(runs, repeat)
    found = told[-1]
    rate = ""
    if with_exact:
        seconds |= best_times({"exact": lambda: told.append(certify(q, k, advise=False, **options))}, 1)
        rate = f"{told[-1].rate.item():.6f}"
    forward = seconds["forward"]
    cells = [
        f"{seconds[name] / forward:.1f}" if name in seconds else "" for name in ("quick", "advice", "history", "exact")
    ]
    support = "full" if "window" not in options else f"band {options['window'][0]}"
    balance = residual_history(q, k, **options)[..., -1].item()
    line = [str(length), support, f"{options.get('epsilon', 1.0)}", f"{1e3 * forward:.1f}", *cells]
    return [*line, f"{balance:.1e}", f"{found.rate.item():.6f}", rate], found.advice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--exact", type=int, default=4096, help="the most tokens of which the exact mode is timed")
    parser.add_argument("--repeat", type=int, default=3)
    arguments, _ = parser.parse_known_args()
    torch.set_num_threads(arguments.threads)
    print_rows([HEAD], WIDTHS)
    for length in arguments.lengths:
        for options in CASES:
            line, advice = row(length, options, arguments.repeat, length <= arguments.exact)
            print_rows([line], WIDTHS)
            if advice:
                print(f"        {advice}", flush=True)


if __name__ == "__main__":
    main()
