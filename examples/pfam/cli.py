"""Command line: train (the default, and the demo), eval, download."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch

from .checkpoint import load_checkpoint, set_aside
from .config import Config
from .dataset import load_dataset
from .download import PFAM_SEED_URL, DownloadError, download
from .evaluate import score_baselines, score_model
from .model import Aligner
from .report import write_certificates, write_pictures, write_tables
from .tables import alignment_table, family_table
from .train import Trainer

INTERRUPTED = 130
_COMMAND = "python -m examples.pfam"
# The settings that are numbers, each an option of `train`.
_KINDS = {"int": int, "int | None": int, "float": float}
_NUMBERS = {field.name: _KINDS[str(field.type)] for field in fields(Config) if str(field.type) in _KINDS}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; the exit status is 0, 1 after a plain error message, or 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0].startswith("--"):
        arguments = arguments if {"--help"} & set(arguments) else ["train", *arguments]
    options = _parser().parse_args(arguments)
    if getattr(options, "threads", None):
        torch.set_num_threads(options.threads)
    try:
        return int(options.run(options))
    except (ValueError, FileNotFoundError, DownloadError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED


def _train(options: argparse.Namespace) -> int:
    began = time.perf_counter()
    if options.resume:
        trainer = Trainer.resume(options.resume)
        print(f"resuming {options.resume} at step {trainer.step} with the settings of its checkpoint")
    else:
        trainer = Trainer(_config(options, Config()), options.out)
        aside = set_aside(options.out)
        if aside:
            print(f"the unfinished run that was there is now {aside}")
    print(trainer.dataset.summary())
    finished = trainer.run(progress=not options.quiet)
    print("\n" + write_tables(trainer))
    if not finished:
        print(f"\nstopped at step {trainer.step}; nothing is lost: {_COMMAND} train --resume {trainer.folder}")
        return INTERRUPTED
    print("\n" + write_certificates(trainer))
    for path in write_pictures(trainer):
        print(f"wrote {path}")
    print(f"done in {time.perf_counter() - began:.0f} s")
    return 0


def _eval(options: argparse.Namespace) -> int:
    state = load_checkpoint(options.checkpoint)
    config = Config.from_dict(state["config"])
    if options.data:
        # The training data stays: families that were trained on are named, so that nobody reports them as unseen.
        config = replace(config, eval_data=options.data)
    config = replace(config, eval_pairs=options.eval_pairs or config.eval_pairs)
    config = replace(config, eval_cap=options.eval_cap or config.eval_cap)
    dataset = load_dataset(config)
    model = Aligner(config)
    model.load_state_dict(state["model"])
    if options.data and dataset.dropped:
        print(f"warning: the checkpoint may have been trained on {', '.join(dataset.dropped)}")
    print(f"{len(dataset.heldout.pairs)} pairs, {dataset.heldout.skipped} skipped for length\n")
    scores = score_model(model, dataset.heldout.pairs, config.decode_threshold, progress=not options.quiet)
    baselines = score_baselines(dataset.heldout.pairs)
    print(f"{alignment_table(baselines, scores)}\n\n{family_table(baselines, scores)}")
    return 0


def _download(options: argparse.Namespace) -> int:
    path = download(options.url, options.out, progress=not options.quiet)
    print(f"{path} is ready: {_COMMAND} train --data {path}")
    return 0


def _config(options: argparse.Namespace, config: Config) -> Config:
    given = {name: getattr(options, name) for name in _NUMBERS if getattr(options, name) is not None}
    if options.data:
        given |= {"data": options.data, "eval_data": options.eval_data}
    elif options.eval_data:
        given["eval_data"] = options.eval_data
    return replace(config, **given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=_COMMAND, description=f"A protein-pair aligner trained on Pfam. {__doc__}")
    commands = parser.add_subparsers(required=True)

    train = commands.add_parser("train", help="train on the shipped sample or on --data, and report")
    train.set_defaults(run=_train)
    train.add_argument("--data", help="Stockholm file or directory, plain or gzip (default: the shipped sample)")
    train.add_argument("--eval-data", help="held-out families (default: the shipped ones, or a share of --data)")
    train.add_argument("--out", default="runs/pfam", help="folder for checkpoints, tables and pictures")
    train.add_argument("--resume", metavar="FOLDER", help="go on with the run whose checkpoint is in FOLDER")
    for name, kind in _NUMBERS.items():
        default = getattr(Config(), name)
        shown = "all" if default is None else default
        train.add_argument(
            f"--{name.replace('_', '-')}", type=kind, metavar="N", help=f"see config.py (default: {shown})"
        )

    evaluate = commands.add_parser("eval", help="score a checkpoint beside the baselines")
    evaluate.set_defaults(run=_eval)
    evaluate.add_argument("checkpoint", help="a run's folder or checkpoint file")
    evaluate.add_argument("--data", help="Stockholm file or directory (default: the run's held-out families)")
    evaluate.add_argument("--eval-pairs", type=int, help="pairs per family (default: the run's)")
    evaluate.add_argument("--eval-cap", type=int, help="longest side of a pair (default: the run's)")

    fetch = commands.add_parser("download", help="fetch all Pfam seed alignments (about 200 MB)")
    fetch.set_defaults(run=_download)
    fetch.add_argument("--url", default=PFAM_SEED_URL)
    fetch.add_argument("--out", type=Path, default=Path("Pfam-A.seed.gz"))

    for command in (train, evaluate, fetch):
        command.add_argument("--quiet", action="store_true", help="no progress bars")
    for command in (train, evaluate):
        command.add_argument("--threads", type=int, help="threads for PyTorch")
    return parser
