"""The training loop: a pure function of its Config, interruptible and resumable at any step."""

from __future__ import annotations

import contextlib
import math
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from .checkpoint import load_checkpoint, prepare_folder, restore_rng, save_checkpoint
from .config import Config
from .dataset import Dataset, load_dataset
from .evaluate import Interrupted, Scores, score_model
from .model import Aligner
from .objective import plan_loss, training_loss
from .sampler import PairSampler

EARLY = 50
"""One evaluation more, at this step: most is learned before the second one of the schedule."""


@dataclass
class History:
    """Everything logged: per step (loss, pairs, seconds), and per evaluation (step, scores)."""

    loss: list[float] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, Scores]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> History:
        evaluations = [(step, Scores(**scores)) for step, scores in values["evaluations"]]
        return cls(list(values["loss"]), list(values["pairs"]), list(values["seconds"]), evaluations)


class Trainer:
    """Model, optimizer, data and history of one run; ``run`` continues from wherever they are.

    Args:
        config: the run.
        folder: where checkpoints go.
        resume: state of a checkpoint, from ``load_checkpoint``.
    """

    def __init__(self, config: Config, folder: str | Path, resume: dict[str, Any] | None = None) -> None:
        self.config, self.folder = config, Path(folder)
        random.seed(config.seed)
        np.random.seed(config.seed)
        torch.manual_seed(config.seed)
        self.dataset: Dataset = load_dataset(config)
        self.sampler = PairSampler(
            self.dataset.train,
            size=config.batch_size,
            cells=config.batch_cells,
            cap=config.cap,
            mutation_rate=config.mutation_rate,
            indels=config.indels,
            seed=config.seed,
        )
        self.model = Aligner(config)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.history, self.step = History(), 0
        self.interrupted = False
        if resume is not None:
            self.model.load_state_dict(resume["model"])
            self.optimizer.load_state_dict(resume["optimizer"])
            self.history, self.step = History.from_dict(resume["history"]), resume["step"]
            restore_rng(resume["rng"])

    @classmethod
    def resume(cls, folder: str | Path) -> Trainer:
        """The run whose checkpoint is in ``folder``, where it stood."""
        state = load_checkpoint(folder)
        prepare_folder(folder, "--resume")
        return cls(Config.from_dict(state["config"]), folder, state)

    def run(self, until: int | None = None, progress: bool = True) -> bool:
        """Train to step ``until`` (default: the end of the schedule); False if the user stopped it.

        Ctrl-C finishes the step in hand and saves; a second Ctrl-C stops at once, with the last checkpoint on disk.
        """
        until = self.config.steps if until is None else min(until, self.config.steps)
        with self._interruptible(), tqdm(total=self.config.steps, initial=self.step, disable=not progress) as bar:
            bar.set_description("training")
            self._evaluate_if_due(progress)
            while self.step < until and not self.interrupted:
                bar.set_postfix_str(self._advance())
                bar.update()
                self._evaluate_if_due(progress)
                if self.step % self.config.save_every == 0:
                    self.save()
        self.save()
        return not self.interrupted

    def save(self) -> Path:
        """Write the checkpoint."""
        state = {
            "config": self.config.to_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "history": self.history.to_dict(),
        }
        return save_checkpoint(self.folder, state)

    @property
    def examples_per_second(self) -> float:
        """Training pairs per second of training time, evaluation not counted."""
        return sum(self.history.pairs) / max(sum(self.history.seconds), 1e-9)

    def _advance(self) -> str:
        began = time.perf_counter()
        batch = self.sampler.batch(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.model.train()
        plans = self.model(batch)
        loss = training_loss(plans, batch.pairs, self.config.barycentre_weight)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.step}; lower --learning-rate")
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.history.loss.append(plan_loss(plans[1].detach(), batch.pairs).item())
        self.history.pairs.append(len(batch.pairs))
        self.history.seconds.append(time.perf_counter() - began)
        recent = self.history.loss[-50:]
        return f"loss {sum(recent) / len(recent):.3f}, {self.examples_per_second:.1f} pairs/s"

    def _evaluate_if_due(self, progress: bool) -> None:
        # Asked before the first step too: a run stopped in the middle of an evaluation makes up for it on resuming.
        scheduled = self.step % self.config.eval_every == 0 or self.step in (EARLY, self.config.steps)
        if not scheduled or (self.history.evaluations and self.history.evaluations[-1][0] == self.step):
            return
        with contextlib.suppress(Interrupted):
            scores = score_model(
                self.model,
                self.dataset.heldout.pairs,
                self.config.decode_threshold,
                progress=progress,
                stop=lambda: self.interrupted,
            )
            self.history.evaluations.append((self.step, scores))

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        def handler(number: int, frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            with contextlib.suppress(RuntimeError):  # the signal came in the middle of another write
                tqdm.write("stopping after this step; Ctrl-C again stops now", file=sys.stderr)

        previous = signal.signal(signal.SIGINT, handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then a cosine to a fiftieth of the peak."""
    warm = min(1.0, (step + 1) / max(config.warmup, 1))
    return config.learning_rate * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * step / config.steps)))
