"""``--device``: the CPU or a GPU, for the examples that move whole models and batches."""

from __future__ import annotations

import argparse

import torch

DEVICES = ("cpu", "cuda")


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``."""
    text = f"where to compute: {', '.join(DEVICES)} (default: cpu)"
    parser.add_argument("--device", choices=DEVICES, default="cpu", metavar="NAME", help=text)


def open_device(name: str) -> torch.device:
    """The device of a name in `DEVICES`.

    Raises:
        ValueError: this PyTorch sees no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU, and PyTorch sees none on this machine; leave it out for the CPU")
    return torch.device(name)
