"""``python -m examples.replace_in_encoder.pretrain``: the shipped softmax checkpoint, from scratch."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from examples.common.files import prepare_folder, replacing
from examples.common.settings import Range, add_quiet, add_threads, set_threads
from examples.common.start import exit_status

from .data import heldout_crops, load_split, training_batches
from .model import CHECKPOINT, FamilyClassifier
from .training import fit

EPOCHS, LEARNING_RATE, WEIGHT_DECAY = 200, 3e-3, 0.05


def pretrain(epochs: int = EPOCHS, seed: int = 0, progress: bool = True) -> FamilyClassifier:
    """Train the model with softmax attention: AdamW, ten per cent of warm-up, then a cosine to zero."""
    split = load_split()
    crops = heldout_crops(split)
    torch.manual_seed(seed)
    model = FamilyClassifier(len(split.names))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    total = epochs * sum(1 for _ in training_batches(split, seed, 0))
    warmup = max(total // 10, 1)

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / total))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    curve = fit(
        model, optimizer, split, crops, epochs=epochs, seed=seed, text="pre-training with softmax",
        evaluate_every=10, scheduler=scheduler, progress=progress,
    )  # fmt: skip
    score = curve.scores[-1][1]
    print(f"{split.summary()}\ntest accuracy {score.accuracy:.3f}, loss {score.loss:.3f}")
    return model


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and save; the exit status is 0, 1 after a plain error message, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m examples.replace_in_encoder.pretrain", description=__doc__)
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help="epochs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=CHECKPOINT, metavar="PATH", help="file to write (default: the shipped checkpoint)"
    )
    add_threads(parser, 1)
    add_quiet(parser)
    options = parser.parse_args(arguments)
    return exit_status(lambda: _run(options), stopped="stopped; nothing was written")


def _run(options: argparse.Namespace) -> None:
    Range(1).check("--epochs", options.epochs)
    Range(0, 2**32 - 1).check("--seed", options.seed)
    set_threads(options)
    prepare_folder(options.out.parent)
    model = pretrain(options.epochs, options.seed, not options.quiet)
    with replacing(options.out) as file:
        torch.save(model.state_dict(), file)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    sys.exit(main())
