"""Command line: train over all XLA devices of the host, resume by itself, profile when asked."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from examples.common.files import CHECKPOINT, prepare_folder
from examples.common.settings import Range, add_quiet, option_name
from examples.common.start import INTERRUPTED, exit_status
from examples.pfam.config import Config
from examples.pfam.device import PRECISIONS, XlaDevice
from examples.pfam.report import write_tables
from examples.pfam.train import Trainer

_FOLDER = "runs/tpu_vm"
_NUMBERS = {
    "steps": (2000, "training steps"),
    "pairs": (4, "most pairs in a batch, per device"),
    "length": (1024, "longest side of a pair; longer ones are cropped, and all are padded to it"),
    "window": (256, "tokens to either side of the scaled diagonal that may be aligned"),
    "base_iters": (20, "Sinkhorn iterations before the tail"),
    "tail_iters": (2, "iterations differentiated exactly"),
    "dim": (64, "width of the tokens"),
    "eval_every": (500, "steps between evaluations"),
    "eval_cap": (400, "longest side of an evaluation pair; longer ones are skipped"),
    "eval_pairs": (20, "evaluation pairs per held-out family"),
    "rounds": (1, "how often the second attention is repeated in evaluation"),
    "save_every": (100, "steps between checkpoints"),
    "fsdp": (1, "devices that every parameter is spread over; the mesh is (devices / N, N)"),
    "seed": (0, "seed of the initial weights, the batches and the dropout"),
}
_PROFILE_AFTER = 10  # steps: what is compiled is compiled by then


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the exit status is 0, 1 after a plain error message, or 130 when stopped, its checkpoint written."""
    options = _parser().parse_args(arguments)
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    for name in ("pairs", "fsdp"):
        Range(1).check(option_name(name), getattr(options, name))
    Range(0).check("--profile", options.profile)
    folder = Path(options.out)
    prepare_folder(folder)
    if options.cache:
        os.environ["XLA_PERSISTENT_CACHE_PATH"] = str(Path(options.cache).resolve())
    device = XlaDevice(options.fsdp, options.precision)
    print(device.describe(), flush=True)
    trainer = _trainer(options, folder, device)
    print(trainer.dataset.summary(), flush=True)
    signal.signal(signal.SIGTERM, _preempted)
    profile = _profile(trainer, folder / "profile", options.profile) if options.profile else None
    began, first = time.perf_counter(), trainer.step
    finished = trainer.run(until=options.until, progress=not options.quiet)
    if profile is not None:
        print(profile())
    print(_speed(trainer, first, time.perf_counter() - began))
    print("\n" + write_tables(trainer, progress=not options.quiet))
    if not finished:
        print(f"\nstopped at step {trainer.step}; the same command goes on from there")
        return INTERRUPTED
    return 0


def _trainer(options: argparse.Namespace, folder: Path, device: XlaDevice) -> Trainer:
    """The run in the folder where it stands, or a new one."""
    if (folder / CHECKPOINT).exists():
        trainer = Trainer.resume(folder, device)
        print(f"resuming {folder} at step {trainer.step} with the settings of its checkpoint")
        return trainer
    direct: tuple[str, ...] = ("steps", "window", "base_iters", "tail_iters", "dim", "eval_every")
    direct += ("eval_pairs", "eval_cap", "rounds", "save_every", "seed")
    settings = {name: getattr(options, name) for name in direct}
    data = {"data": options.data, "eval_data": options.eval_data} if options.data else {}
    config = Config(
        **settings,
        **data,
        batch_size=options.pairs * device.count,
        batch_cells=options.pairs * device.count * options.length**2,
        cap=options.length,
        gradient="tail",  # the resident kernels have this one; the implicit gradient streams
        train_rounds=1,
    )
    return Trainer(config, folder, device=device)


def _preempted(number: int, frame: FrameType | None) -> None:
    """What a TPU VM sends before it is taken away: stop as after Ctrl-C, with a checkpoint."""
    signal.raise_signal(signal.SIGINT)


def _profile(trainer: Trainer, folder: Path, steps: int) -> Callable[[], str]:
    """Trace `steps` steps, once the run is under way, for TensorBoard's profile plugin or xprof. What comes back ends a
    trace that the run did not last for, and says what there is."""
    xp = importlib.import_module("torch_xla.debug.profiler")
    start, over = trainer.step + _PROFILE_AFTER, threading.Event()

    def watch() -> None:
        while trainer.step < start and not over.is_set():
            over.wait(0.01)
        if over.is_set():
            return
        xp.start_trace(str(folder))
        while trainer.step < start + steps and not over.is_set():
            over.wait(0.01)
        xp.stop_trace()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()

    def finish() -> str:
        over.set()
        watcher.join()
        traced = min(trainer.step - start, steps)
        return f"traced {traced} steps into {folder}" if traced > 0 else f"no trace: it begins after step {start}"

    return finish


def _speed(trainer: Trainer, first: int, seconds: float) -> str:
    """Programs compiled are what should stay constant; a number that grows with the steps is a shape that varies."""
    metrics = importlib.import_module("torch_xla.debug.metrics")
    compiled = metrics.counter_value("UncachedCompile") or 0
    return (
        f"steps {first} to {trainer.step} in {seconds:.1f} s with evaluation and compilation, {compiled} programs "
        f"compiled; {trainer.examples_per_second:.1f} pairs per second of training"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.tpu_vm",
        description="Train the aligner of examples/pfam over all XLA devices of this host: the chips of a TPU VM, or "
        "with PJRT_DEVICE=CPU and CPU_NUM_DEVICES=8 virtual ones. A run in --out goes on where it stands.",
    )
    for name, (number, meaning) in _NUMBERS.items():
        text = f"{meaning} (default: {number})"
        parser.add_argument(option_name(name), type=int, default=number, metavar="N", help=text)
    parser.add_argument("--until", type=int, metavar="N", help="stop at this step of the schedule (default: its end)")
    parser.add_argument("--data", metavar="PATH", help="Stockholm file or directory (default: the shipped sample)")
    text = "held-out families (default: the shipped ones, or a share of --data)"
    parser.add_argument("--eval-data", metavar="PATH", help=text)
    text = "folder of checkpoint, tables and profile (default: %(default)s)"
    parser.add_argument("--out", metavar="PATH", default=_FOLDER, help=text)
    text = "of linear layers and convolutions (default: %(default)s)"
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help=text)
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="trace N steps into the folder's profile")
    parser.add_argument("--cache", metavar="PATH", help="folder to keep compiled programs in, for the next start")
    add_quiet(parser)
    return parser
