"""Bias of the tail gradient against the implicit one, and the a-posteriori rate, at converged duals.

    python benchmarks/bias.py [--threads 2] [--tokens 128]

The bias is ||dS_tail - dS_implicit||_1 / ||dS_implicit||_1 for Gaussian q, k, v and output gradient, d = 32, float64.
"""

from __future__ import annotations

import argparse

import torch

from torch_sinkhorn_attn import certify

BASE_ITERS = 4000  # enough to converge every row of the table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=128)
    arguments, _ = parser.parse_known_args()
    torch.set_num_threads(arguments.threads)
    g = torch.Generator().manual_seed(0)
    shape = (1, arguments.tokens, 32)
    q, k, value, grad_output = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(4))
    print(f"n = {arguments.tokens}, d = 32, T = {BASE_ITERS}")
    print("  ".join(x.rjust(12) for x in ("window", "epsilon", "rate", "R = 1", "R = 2", "R = 4")))
    for window in (None, (16, 16), (8, 8)):
        for epsilon in (1.0, 0.25):
            found = [
                certify(
                    q, k, value=value, grad_output=grad_output, window=window, epsilon=epsilon,
                    base_iters=BASE_ITERS, tail_iters=r,
                )
                for r in (1, 2, 4)
            ]  # fmt: skip
            cells = ["full" if window is None else str(window), f"{epsilon}", f"{found[0].rate.item():.4f}"]
            cells += [f"{100 * c.relative_bias.item():.3g} %" for c in found]
            print("  ".join(cell.rjust(12) for cell in cells), flush=True)


if __name__ == "__main__":
    main()
