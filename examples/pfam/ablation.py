"""What each part is worth: the same training with one setting changed, several seeds each, in one table."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from examples.common.files import replacing
from examples.common.tables import table

from .config import Config
from .decode import DECODERS, DEFAULT_DECODER
from .evaluate import Result, Scores, align_pairs, measure_plan
from .summary import by_identity
from .train import Trainer

VARIANTS: dict[str, dict[str, Any]] = {
    "Sinkhorn": {},
    "softmax": {"attention": "softmax"},
    "dual-softmax": {"attention": "dual-softmax"},
    "T = 10": {"base_iters": 10},
    "tail gradient, R = 2": {"gradient": "tail"},
    "tail gradient, R = 8": {"gradient": "tail", "tail_iters": 8},
    "unrolled gradient": {"gradient": "unrolled"},
    "dustbin of capacity 1": {"capacity": "one"},
    "window of 48": {"window": 48},
    "relaxation 4": {"relaxation": 4.0},
    "gaps of one kind": {"gaps": "affine"},
    "one pair HMM": {"kin": "one"},
    "no pair HMM": {"gaps": "single"},
    "no context profiles": {"profiles": "none"},
    "second attention once": {"train_rounds": 1, "rounds": 1},
    "no augmentation": {"mutation_rate": 0.0, "indels": 0.0},
    "no flanks": {"flanked": 0.0, "unrelated": 0.0},
}
"""The settings that each variant changes; the first changes nothing."""

DISTANT = "identity <= 0.2"
"""The most distant pairs' name in ``summary.by_identity``."""
_RESULT = "result.json"
_PATIENCE = 5.0
"""Seconds that runs have to stop in."""


def ablate(
    config: Config,
    names: Sequence[str],
    seeds: int,
    folder: Path,
    jobs: int,
    progress: bool = True,
    reading: Mapping[str, Any] | None = None,
) -> dict[str, list[dict[str, float]]]:
    """Train and score every variant with every seed; the figures by variant, a dictionary per seed.

    Each run has a thread and a folder of its own. Those that ``folder`` holds already, with the same settings, are
    read, so an interrupted ablation goes on; after a change of the program, take another folder.

    Args:
        reading: ``cache`` and ``max_text`` of ``Trainer``.

    Raises:
        ValueError: no such variant.
        KeyboardInterrupt: after Ctrl-C; the runs in hand are ended, and have no figures.
    """
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise ValueError(f"no variant is named {', '.join(unknown)}; choose from {', '.join(VARIANTS)}")
    runs = [(name, seed) for seed in range(seeds) for name in names]
    configs = {run: replace(config, seed=run[1], **VARIANTS[run[0]]) for run in runs}
    found: dict[tuple[str, int], dict[str, float]] = {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        with _no_interrupts():  # the processes start so, and stay silent: they are ended below
            waiting = {pool.submit(_run, configs[run], _folder(folder, *run), reading): run for run in runs}
        try:
            for done in tqdm(as_completed(waiting), "training", len(runs), unit="run", disable=not progress):
                found[waiting[done]] = done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            # Runs that were training stop after their step, as Trainer does; what does anything else is ended.
            if wait(waiting, _PATIENCE).not_done:
                for process in multiprocessing.active_children():
                    process.terminate()
            raise
    return {name: [found[name, seed] for seed in range(seeds)] for name in names}


def ablation_table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """The mean over seeds and, in brackets, the range, of every figure; "diverged" if a seed's training did."""
    names = list(next((run for runs in found.values() for run in runs if run), {}))
    rows = []
    for variant, runs in found.items():
        if not all(runs):
            rows.append([variant, *["diverged"] * len(names)])
            continue
        columns = [np.array([run[name] for run in runs]) for name in names]
        cells = [f"{x.mean():.{_digits(x)}f} ({np.ptp(x):.{_digits(x)}f})" for x in columns]
        rows.append([variant, *cells])
    return table(["mean (range over seeds)", *names], rows)


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Within it Ctrl-C, which reaches every process of the terminal, is ignored, and by processes that start there."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _run(config: Config, folder: Path, reading: Mapping[str, Any] | None = None) -> dict[str, float]:
    """One run's figures, from its folder if they are there; none if the training diverged."""
    path = folder / _RESULT
    if path.exists():
        held = _held(path)
        if held.get("config") == config.to_dict():
            return dict(held["figures"])
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, folder, **(reading or {}))
    try:
        if not trainer.run(progress=False):
            raise KeyboardInterrupt  # half a run has no figures
        figures = {**_figures(trainer), "pairs/s": trainer.examples_per_second}
    except FloatingPointError:
        figures = {}
    with replacing(path) as file:
        file.write(json.dumps({"config": config.to_dict(), "figures": figures}, indent=1).encode())
    return figures


def _held(path: Path) -> dict[str, Any]:
    """What a run's file holds; nothing if that is no record of ours."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) and isinstance(held.get("figures"), dict) else {}


def _figures(trainer: Trainer) -> dict[str, float]:
    """F1 by decoder, macro; at low identity; row accuracy and barycentre error of the plan."""
    results: dict[str, list[Result]] = {name: [] for name in DECODERS}
    for pair, plan in align_pairs(trainer.model, trainer.dataset.heldout.pairs, batch_size=4):
        for name, decode in DECODERS.items():
            results[name].append(measure_plan(pair, plan, decode(plan)))
    figures = {f"F1, {name}": Scores.of(found).macro["f1"] for name, found in results.items()}
    decoded = results[DEFAULT_DECODER]
    overall, distant = Scores.of(decoded).macro, Scores.of(by_identity(decoded)[DISTANT]).macro
    figures[f"F1, {DISTANT}"] = distant.get("f1", math.nan)
    return {**figures, "row accuracy": overall["row accuracy"], "barycentre error": overall["barycentre"]}


def _folder(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name.replace(' ', '_').replace('=', '')}-{seed}"


def _digits(values: np.ndarray) -> int:
    return 1 if values.mean() >= 10 else 3
