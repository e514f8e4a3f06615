"""Command line: train both models for every seed, end with tables and pictures."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from examples.common.devices import add_device, open_device
from examples.common.files import REPORT, prepare_folder, replace_text, set_aside
from examples.common.settings import add_quiet, add_setting, add_threads, given, set_threads, settings_of
from examples.common.start import exit_status

from .data import Digits, Split, load_split
from .maps import plot_class_token, plot_matrices, plot_reading
from .measure import Outcome, attention_weights, class_token_view, first_of_each_class, measure, received
from .plots import plot_learning
from .report import write_report
from .settings import Settings
from .train import Learner, steps_per_epoch, train, warm_up

_FOLDER = "runs/digits_vit"
_SHOWN, _CLOSER = 5, 3  # digits 0 to 4 are drawn, the 3 in detail


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status is 0, 1 after a plain error message, or 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    began = time.perf_counter()
    set_threads(options)
    settings = Settings(**given(options, Settings), dustbin=options.dustbin)
    device = open_device(options.device)
    folder, progress = Path(options.out), not options.quiet
    prepare_folder(folder)
    split = load_split()
    set_aside(folder)
    print(split.summary())
    models, outcomes = _train_all(settings, split, device, progress)
    report = write_report(settings, split, outcomes)
    # The report comes first: it is what marks the folder as a run's.
    replace_text(folder / REPORT, report + "\n")
    print(f"\n{report}\n")
    for path in [folder / REPORT, *_write_pictures(folder, split.test, models, outcomes)]:
        print(f"wrote {path}")
    print(f"done in {time.perf_counter() - began:.0f} s")


def _train_all(
    settings: Settings, split: Split, device: torch.device, progress: bool
) -> tuple[dict[str, Learner], dict[str, list[Outcome]]]:
    """The trained models of seed 0, and the outcomes of every seed, both under the attentions' names."""
    kept: dict[str, Learner] = {}
    outcomes: dict[str, list[Outcome]] = {}
    warm_up(settings, split, device)
    total = settings.seeds * settings.epochs * steps_per_epoch(settings, split)
    with tqdm(total=total, unit="step", disable=not progress) as bar:
        for seed in range(settings.seeds):
            bar.set_description(f"seed {seed + 1} of {settings.seeds}")
            learners = train(settings, split, seed, bar, device)
            for name, learner in learners.items():
                outcomes.setdefault(name, []).append(measure(learner, split.test))
            kept = kept or learners
    return kept, outcomes


def _write_pictures(
    folder: Path, test: Digits, learners: dict[str, Learner], outcomes: dict[str, list[Outcome]]
) -> list[Path]:
    """The pictures; those of single digits show the models of seed 0."""
    learning, reading, matrices, class_token = (
        folder / f"{name}.png" for name in ("learning", "reading", "matrices", "class_token")
    )
    shown = first_of_each_class(test, _SHOWN)
    weights = {name: attention_weights(learner, shown.images) for name, learner in learners.items()}
    plot_learning(outcomes, learning)
    plot_reading(shown, {name: received(w) for name, w in weights.items()}, outcomes, reading)
    plot_matrices(shown.images[_CLOSER], {name: w[0, _CLOSER] for name, w in weights.items()}, matrices)
    plot_class_token(shown, {name: class_token_view(w) for name, w in weights.items()}, class_token)
    return [learning, reading, matrices, class_token]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits_vit",
        description="Train a small vision transformer on handwritten digits with softmax and with Sinkhorn attention, "
        "side by side; end with tables and pictures.",
    )
    for setting in settings_of(Settings).values():
        add_setting(parser, setting)
    parser.add_argument("--dustbin", action="store_true", help="train a third model, Sinkhorn attention with a dustbin")
    parser.add_argument(
        "--out", metavar="PATH", default=_FOLDER, help="folder for the tables and pictures (default: %(default)s)"
    )
    add_device(parser)
    add_threads(parser, 1)
    add_quiet(parser)
    return parser
