"""Command line: the whole experiment, with a table, pictures and a report."""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.common.devices import add_device, open_device
from examples.common.files import REPORT, prepare_folder, replace_text, set_aside
from examples.common.settings import (
    Range,
    add_quiet,
    add_setting,
    add_threads,
    check_settings,
    given,
    set_threads,
    setting,
    settings_of,
)  # fmt: skip
from examples.common.start import exit_status

from .data import TEST_CROPS, load_split
from .model import CHECKPOINT, load_model
from .plots import write_pictures
from .stages import StageError, run

_FOLDER = "runs/replace_in_encoder"


@dataclass(frozen=True)
class Settings:
    """What a run can be given in numbers."""

    epochs: int = setting(10, Range(1), "epochs of each fine-tuning")
    seed: int = setting(0, Range(0, 2**32 - 1), "seed of training crops and dropout")
    epsilon: float = setting(1.0, Range(0, math.inf, "(]"), "epsilon of Sinkhorn attention")
    test_crops: int = setting(TEST_CROPS, Range(1), "of each family")

    def __post_init__(self) -> None:
        check_settings(self)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; the exit status is 0, 1 after a plain error message, or 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    return exit_status(lambda: _run(options), StageError)


def _run(options: argparse.Namespace) -> None:
    began = time.perf_counter()
    settings = Settings(**given(options, Settings))
    set_threads(options)
    device = open_device(options.device)
    # torch says so whenever nn.TransformerEncoder packs a batch, which is what is wanted here.
    warnings.filterwarnings("ignore", "The PyTorch API of nested tensors is in prototype stage")
    split = load_split()
    model = load_model(options.checkpoint, len(split.names)).to(device)
    prepare_folder(options.out)
    set_aside(options.out)
    result = run(
        model,
        split,
        epochs=settings.epochs,
        seed=settings.seed,
        epsilon=settings.epsilon,
        crops_per_family=settings.test_crops,
        progress=not options.quiet,
    )
    setting = f"{settings.epochs} epochs of fine-tuning, seed {settings.seed}, epsilon {settings.epsilon:g}"
    text = f"{result.split.summary()}\n{setting}\n\n{result.table()}"
    paths = write_pictures(result, options.out)
    report = Path(options.out) / REPORT
    replace_text(report, text + "\n")
    print(f"\n{result.table()}\n")
    for path in (report, *paths):
        print(f"wrote {path}")
    print(f"done in {time.perf_counter() - began:.0f} s")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.replace_in_encoder",
        description="Swap the softmax attention of a trained nn.TransformerEncoder for Sinkhorn attention, fine-tune, "
        "swap back; scores and pictures of every stage, and a control that keeps softmax.",
    )
    add = parser.add_argument
    for of in settings_of(Settings).values():
        add_setting(parser, of)
    add("--checkpoint", default=str(CHECKPOINT), metavar="PATH", help="softmax weights (default: the shipped ones)")
    add("--out", default=_FOLDER, metavar="PATH", help="folder for report and pictures (default: %(default)s)")
    add_device(parser)
    add_threads(parser, 1)
    add_quiet(parser)
    return parser
