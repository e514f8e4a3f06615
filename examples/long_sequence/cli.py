"""Train the encoder on one sequence, in this process and over several, and compare the losses.

    python -m examples.long_sequence [--ranks 2] [--tokens 2048] [--steps 32]

With `torchrun --nproc-per-node N -m examples.long_sequence` the processes are torchrun's, over NCCL where there are
GPUs.
"""

from __future__ import annotations

import argparse
import os

import torch

from examples.long_sequence.training import spread, train, under_torchrun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=32)
    arguments = parser.parse_args()
    if "LOCAL_RANK" in os.environ:
        return under_torchrun(arguments.tokens, arguments.steps)
    one = train(arguments.tokens, arguments.steps, torch.device("cpu"), None)
    many = spread(arguments.ranks, arguments.tokens, arguments.steps)
    print(f"step  one process  {arguments.ranks} processes")
    for step, (x, y) in enumerate(zip(one, many, strict=True)):
        if step % 4 == 0 or step == arguments.steps - 1:
            print(f"{step:4}  {x:11.6f}  {y:11.6f}")
    print(f"largest difference: {max(abs(x - y) for x, y in zip(one, many, strict=True)):.1e}")
