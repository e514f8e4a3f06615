"""``python -m examples.replace_in_encoder.pretrain``: the shipped softmax checkpoint, from scratch."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from examples.pfam.checkpoint import prepare_folder
from examples.pfam.config import Range

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
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="threads for PyTorch (default: %(default)s)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    try:
        Range(1).check("--epochs", options.epochs)
        Range(0, 2**32 - 1).check("--seed", options.seed)
        Range(1, 1024).check("--threads", options.threads)
        torch.set_num_threads(options.threads)
        prepare_folder(options.out.parent)
        model = pretrain(options.epochs, options.seed, not options.quiet)
        partial = options.out.with_suffix(".partial")  # Ctrl-C or a full disk leaves the old file whole
        torch.save(model.state_dict(), partial)
        os.replace(partial, options.out)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
