"""Command line: the whole experiment, with a table, pictures and a report."""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from examples.pfam.checkpoint import REPORT, prepare_folder, set_aside
from examples.pfam.config import Range

from .data import TEST_CROPS, load_split
from .model import CHECKPOINT, load_model
from .plots import write_pictures
from .stages import StageError, run

INTERRUPTED = 130
_FOLDER = "runs/replace_in_encoder"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; the exit status is 0, 1 after a plain error message, or 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        _check(options)
        torch.set_num_threads(options.threads)
        # torch says so whenever nn.TransformerEncoder packs a batch, which is what is wanted here.
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors is in prototype stage")
        _run(options)
    except (ValueError, OSError, StageError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    return 0


def _run(options: argparse.Namespace) -> None:
    began = time.perf_counter()
    split = load_split()
    model = load_model(options.checkpoint, len(split.names))
    prepare_folder(options.out)
    aside = set_aside(options.out)
    if aside:
        print(f"the earlier run in {options.out} is now in {aside}")
    result = run(
        model,
        split,
        epochs=options.epochs,
        seed=options.seed,
        epsilon=options.epsilon,
        crops_per_family=options.test_crops,
        progress=not options.quiet,
    )
    setting = f"{options.epochs} epochs of fine-tuning, seed {options.seed}, epsilon {options.epsilon:g}"
    text = f"{result.split.summary()}\n{setting}\n\n{result.table()}"
    paths = write_pictures(result, options.out)
    report = Path(options.out) / REPORT
    report.write_text(text + "\n")
    print(f"\n{result.table()}\n")
    for path in (report, *paths):
        print(f"wrote {path}")
    print(f"done in {time.perf_counter() - began:.0f} s")


def _check(options: argparse.Namespace) -> None:
    Range(1).check("--epochs", options.epochs)
    Range(0, 2**32 - 1).check("--seed", options.seed)
    Range(1, 1024).check("--threads", options.threads)
    Range(0, math.inf, "(]").check("--epsilon", options.epsilon)
    Range(1).check("--test-crops", options.test_crops)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.replace_in_encoder",
        description="Swap the softmax attention of a trained nn.TransformerEncoder for Sinkhorn attention, fine-tune, "
        "swap back; scores and pictures of every stage, and a control that keeps softmax.",
    )
    add = parser.add_argument
    add("--epochs", type=int, default=10, metavar="N", help="epochs of each fine-tuning (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="seed of training crops and dropout (default: %(default)s)")
    add("--epsilon", type=float, default=1.0, metavar="X", help="epsilon of Sinkhorn attention (default: %(default)s)")
    add("--checkpoint", default=str(CHECKPOINT), metavar="PATH", help="softmax weights (default: the shipped ones)")
    add("--test-crops", type=int, default=TEST_CROPS, metavar="N", help="of each family (default: %(default)s)")
    add("--out", default=_FOLDER, metavar="PATH", help="folder for report and pictures (default: %(default)s)")
    add("--threads", type=int, default=1, metavar="N", help="threads for PyTorch (default: %(default)s)")
    add("--quiet", action="store_true", help="no progress bars")
    return parser
