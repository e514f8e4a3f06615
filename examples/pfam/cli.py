"""Command line: train (the default, and the demo), eval, download."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch

from .checkpoint import CHECKPOINT, load_checkpoint, prepare_folder, set_aside
from .config import Config, Range, option_name
from .dataset import load_dataset
from .device import DEVICES, PRECISIONS, open_device
from .download import PFAM_SEED_URL, DownloadError, download
from .evaluate import score_baselines, score_model
from .model import Aligner
from .report import write_certificates, write_pictures, write_tables
from .tables import alignment_table, family_table
from .train import Trainer

INTERRUPTED = 130
# The settings that are numbers, each an option of `train`.
_NUMBERS = {setting.name: setting for setting in fields(Config) if setting.metadata}
_EVALUATION = ("eval_pairs", "eval_cap")
_THREADS = Range(1, 1024)
_FOLDER = "runs/pfam"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; the exit status is 0, 1 after a plain error message, or 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or (arguments[0].startswith("--") and arguments[0] != "--help"):
        arguments = ["train", *arguments]
    options = _parser().parse_args(arguments)
    try:
        if getattr(options, "threads", None) is not None:
            _THREADS.check("--threads", options.threads)
            torch.set_num_threads(options.threads)
        return int(options.run(options))
    except (ValueError, OSError, DownloadError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED


def _command() -> str:
    """What runs this example again in the user's shell: .venv need not be activated."""
    python, here = Path(sys.executable), Path.cwd()
    return f"{shlex.quote(str(python.relative_to(here) if python.is_relative_to(here) else python))} -m examples.pfam"


def _train(options: argparse.Namespace) -> int:
    began = time.perf_counter()
    device = open_device(options.device, options.fsdp, options.precision)
    if options.resume is not None:
        _refuse_settings(options)
        trainer = Trainer.resume(options.resume, device)
        print(f"resuming {options.resume} at step {trainer.step} with the settings of its checkpoint")
    else:
        config, folder = _config(options, Config()), options.out or _FOLDER
        prepare_folder(folder)
        trainer = Trainer(config, folder, device=device)
        aside = set_aside(folder)
        if aside:
            print(f"the earlier run in {folder} is now in {aside}")
    hint = f"{_command()} train --resume {shlex.quote(str(trainer.folder))}"
    try:
        print("\n".join(line for line in (trainer.dataset.summary(), device.describe()) if line))
        finished = trainer.run(progress=not options.quiet)
        print("\n" + write_tables(trainer))
        if not finished:
            print(f"\nstopped at step {trainer.step}; nothing is lost: {hint}")
            return INTERRUPTED
        print("\n" + write_certificates(trainer, progress=not options.quiet))
        for path in write_pictures(trainer, progress=not options.quiet):
            print(f"wrote {path}")
    except KeyboardInterrupt:
        saved = (trainer.folder / CHECKPOINT).exists()
        print(f"\nstopped; from the last checkpoint: {hint}" if saved else "\nstopped before the first checkpoint")
        return INTERRUPTED
    print(f"done in {time.perf_counter() - began:.0f} s")
    return 0


def _refuse_settings(options: argparse.Namespace) -> None:
    names = {"data", "eval_data", "out", *_NUMBERS}
    given = [option_name(name) for name in sorted(names) if getattr(options, name) is not None]
    if given:
        options.error(
            f"{', '.join(given)}: --resume goes on with the settings of its checkpoint; leave them out, or leave out "
            "--resume to start a new run"
        )


def _eval(options: argparse.Namespace) -> int:
    state = load_checkpoint(options.checkpoint)
    config = Config.from_dict(state["config"])
    if options.data:
        # The training data stays: families that were trained on are named, so that nobody reports them as unseen.
        config = replace(config, eval_data=options.data)
    given = {name: getattr(options, name) for name in _EVALUATION if getattr(options, name) is not None}
    config = replace(config, **given)
    dataset = load_dataset(config)
    model = Aligner(config)
    model.load_state_dict(state["model"])
    device = open_device(options.device)
    device.model(model)
    if options.data and dataset.dropped:
        print(f"warning: the checkpoint may have been trained on {', '.join(dataset.dropped)}")
    print(f"{len(dataset.heldout.pairs)} pairs, {dataset.heldout.skipped} skipped for length\n")
    progress = not options.quiet
    scores = score_model(model, dataset.heldout.pairs, config.decode_threshold, progress=progress, device=device)
    baselines = score_baselines(dataset.heldout.pairs)
    print(f"{alignment_table(baselines, scores)}\n\n{family_table(baselines, scores)}")
    return 0


def _download(options: argparse.Namespace) -> int:
    path = download(options.url, options.out, progress=not options.quiet)
    print(f"{path} is ready: {_command()} train --data {shlex.quote(str(path))}")
    return 0


def _config(options: argparse.Namespace, config: Config) -> Config:
    given = {name: getattr(options, name) for name in _NUMBERS if getattr(options, name) is not None}
    if options.data:
        given |= {"data": options.data, "eval_data": options.eval_data}
    elif options.eval_data:
        given["eval_data"] = options.eval_data
    return replace(config, **given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_command(),
        description="Train a protein-pair aligner on Pfam, score a trained one, or download more data. "
        "Without a command it trains.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    text = "Train on the shipped sample or on --data, and report"
    train = commands.add_parser("train", help=text, description=f"{text}.")
    train.usage = f"{train.prog} [OPTIONS]"
    train.set_defaults(run=_train, error=train.error)
    train.add_argument(
        "--data", metavar="PATH", help="Stockholm file or directory, plain or gzip (default: the shipped sample)"
    )
    train.add_argument(
        "--eval-data", metavar="PATH", help="held-out families (default: the shipped ones, or a share of --data)"
    )
    train.add_argument(
        "--out", metavar="PATH", help=f"folder for the checkpoint, tables and pictures (default: {_FOLDER})"
    )
    train.add_argument("--resume", metavar="PATH", help="go on with the run in this folder; its settings stay")
    for name in _NUMBERS:
        _add_number(train, name, "all" if _NUMBERS[name].default is None else str(_NUMBERS[name].default))

    text = "Score a checkpoint beside the baselines"
    evaluate = commands.add_parser("eval", help=text, description=f"{text}.")
    evaluate.set_defaults(run=_eval)
    evaluate.add_argument("checkpoint", metavar="PATH", help="a run's folder or checkpoint file")
    evaluate.add_argument(
        "--data", metavar="PATH", help="Stockholm file or directory (default: the run's held-out families)"
    )
    for name in _EVALUATION:
        _add_number(evaluate, name, "the run's")

    text = "Fetch all Pfam seed alignments (about 200 MB)"
    fetch = commands.add_parser("download", help=text, description=f"{text}.")
    fetch.set_defaults(run=_download)
    fetch.add_argument("--url", metavar="URL", default=PFAM_SEED_URL, help="gzip file to fetch (default: %(default)s)")
    fetch.add_argument(
        "--out",
        metavar="PATH",
        type=Path,
        default=Path("Pfam-A.seed.gz"),
        help="file to write; one that exists is kept (default: %(default)s)",
    )

    for command in (train, evaluate, fetch):
        command.add_argument("--quiet", action="store_true", help="no progress bars")
    train.add_argument(
        "--fsdp", type=int, default=1, metavar="N", help="XLA devices to spread parameters over (default: 1)"
    )
    text = f"of linear layers and convolutions on XLA devices, {' or '.join(PRECISIONS)} (default: float32)"
    train.add_argument("--precision", choices=PRECISIONS, default="float32", metavar="NAME", help=text)
    for command in (train, evaluate):
        text = f"{' or '.join(DEVICES)}, XLA's through torch_xla: all its TPUs, or its CPU (default: cpu)"
        command.add_argument("--device", choices=DEVICES, default="cpu", metavar="NAME", help=text)
        command.add_argument("--threads", type=int, metavar="N", help="threads for PyTorch (default: PyTorch's choice)")
    return parser


def _add_number(parser: argparse.ArgumentParser, name: str, default: str) -> None:
    setting = _NUMBERS[name]
    kind, metavar = (float, "X") if setting.type == "float" else (int, "N")
    text = f"{setting.metadata['meaning']} (default: {default})"
    parser.add_argument(option_name(name), type=kind, metavar=metavar, help=text)
