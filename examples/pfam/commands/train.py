"""``train``: a run from its start or its checkpoint to its report. The default, and the demo."""

from __future__ import annotations

import argparse
import shlex
import time
from typing import Any

from examples.common.files import CHECKPOINT, prepare_folder, set_aside
from examples.common.settings import Range, add_quiet, add_setting, option_name
from examples.common.start import INTERRUPTED
from examples.common.text import say

from ..config import Config
from ..dataset import in_brief
from ..device import PRECISIONS, Device, open_device
from ..distributed import Processes, join
from ..identity import Known
from ..report import write_certificates, write_pictures, write_tables
from ..tensorboard_log import FOLDER
from ..train import Trainer
from .options import (
    NUMBERS,
    add_device,
    add_reading,
    check_reading,
    command_line,
    given_settings,
    keep_streams,
)

_FOLDER = "runs/pfam"
_WORKERS = Range(0, 256)


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    text = "Train on the shipped sample or on --data, and report"
    parser = commands.add_parser("train", help=text, description=f"{text}.")
    parser.usage = f"{parser.prog} [OPTIONS]"
    parser.set_defaults(run=run, error=parser.error)
    parser.add_argument(
        "--data", metavar="PATH", help="Stockholm file, pipe or directory, plain or gzip (default: the shipped sample)"
    )
    parser.add_argument(
        "--eval-data", metavar="PATH", help="held-out families (default: the shipped ones, or a share of --data)"
    )
    parser.add_argument(
        "--out", metavar="PATH", help=f"folder for the checkpoint, tables and pictures (default: {_FOLDER})"
    )
    parser.add_argument("--resume", metavar="PATH", help="go on with the run in this folder; its settings stay")
    for name in NUMBERS:
        add_setting(parser, NUMBERS[name], "all" if NUMBERS[name].default is None else None)
    add_quiet(parser)
    parser.add_argument(
        "--fsdp", type=int, default=1, metavar="N", help="XLA devices to spread parameters over (default: 1)"
    )
    text = f"of linear layers and convolutions in training, {' or '.join(PRECISIONS)} (default: float32)"
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", metavar="NAME", help=text)
    text = "processes that draw batches ahead of the training (default: 0, none)"
    parser.add_argument("--workers", type=int, default=0, metavar="N", help=text)
    add_reading(parser)
    parser.add_argument("--no-tensorboard", action="store_true", help=f"write no log to {FOLDER} in the run's folder")
    add_device(parser)


def run(options: argparse.Namespace) -> int:
    """Train, then print and write the report; under torchrun the first process alone prints and writes."""
    _WORKERS.check("--workers", options.workers)
    check_reading(options)
    if options.resume is not None:
        _refuse_settings(options)
    with join(options.device) as processes:
        return _run(options, processes)


def _run(options: argparse.Namespace, processes: Processes) -> int:
    began = time.perf_counter()
    keep_streams(options, processes.world)
    device = open_device(options.device, options.fsdp, options.precision, processes.local_rank)
    trainer = _trainer(options, device, processes)
    progress = not options.quiet
    if not processes.first:
        return 0 if trainer.run(progress=False) else INTERRUPTED
    start = command_line() if processes.world == 1 else f"torchrun --nproc-per-node {processes.world} -m examples.pfam"
    hint = f"{start} train --resume {shlex.quote(str(trainer.folder))}"
    try:
        head = (trainer.dataset.summary(), _profiled(trainer), device.describe(), processes.describe())
        say("\n".join(line for line in head if line))
        finished = trainer.run(progress=progress)
        say("\n" + write_tables(trainer, progress=progress))
        if not finished:
            say(f"\nstopped at step {trainer.step}; nothing is lost: {hint}")
            return INTERRUPTED
        say("\n" + write_certificates(trainer, progress=progress))
        for path in write_pictures(trainer, progress=progress):
            say(f"wrote {path}")
    except KeyboardInterrupt:
        saved = (trainer.folder / CHECKPOINT).exists()
        say(f"\nstopped; from the last checkpoint: {hint}" if saved else "\nstopped before the first checkpoint")
        return INTERRUPTED
    say(f"done in {time.perf_counter() - began:.0f} s")
    return 0


def _trainer(options: argparse.Namespace, device: Device, processes: Processes) -> Trainer:
    """A new run, or one from its checkpoint; the folder is made ready by the first process."""
    place: dict[str, Any] = {"device": device, "processes": processes, "workers": options.workers}
    place |= {"cache": options.cache, "max_text": options.max_text, "tensorboard": not options.no_tensorboard}
    if options.resume is not None:
        trainer = Trainer.resume(options.resume, **place)
        if processes.first:
            say(f"resuming {options.resume} at step {trainer.step} with the settings of its checkpoint")
        return trainer
    config, folder = given_settings(options, Config()), options.out or _FOLDER
    if processes.first:
        prepare_folder(folder)
    trainer = Trainer(config, folder, **place)
    if processes.first:
        set_aside(folder)
    return trainer


def _profiled(trainer: Trainer) -> str:
    """A note if the profiles that training starts with know what is held out; else nothing."""
    told = Known(trainer.profiled_on).among(trainer.dataset.heldout_families)
    if not told:
        return ""
    return (
        f"note: the context profiles were taught by {len(told)} of the held-out families ({in_brief(told)}); "
        "--profiles none trains without them"
    )


def _refuse_settings(options: argparse.Namespace) -> None:
    names = {"data", "eval_data", "out", *NUMBERS}
    given = [option_name(name) for name in sorted(names) if getattr(options, name) is not None]
    if given:
        options.error(
            f"{', '.join(given)}: --resume goes on with the settings of its checkpoint; leave them out, or leave out "
            "--resume to start a new run"
        )
