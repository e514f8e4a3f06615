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
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoint import load_checkpoint, prepare_folder, restore_rng, save_checkpoint
from .config import Config
from .dataset import Dataset, load_dataset
from .device import Device, on_cpu
from .evaluate import Interrupted, Scores, score_model
from .model import Aligner
from .sampler import Batch, PairSampler

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
        resume: state of a checkpoint, from ``load_checkpoint``; of any device.
        device: where to compute, the CPU by default.
    """

    def __init__(
        self,
        config: Config,
        folder: str | Path,
        resume: dict[str, Any] | None = None,
        device: Device | None = None,
    ) -> None:
        self.config, self.folder, self.device = config, Path(folder), device or Device()
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
        if resume is not None:
            self.model.load_state_dict(resume["model"])
        self.device.model(self.model)
        self.optimizer = self.device.optimizer(self.model.parameters(), config.learning_rate, config.weight_decay)
        self.history, self.step = History(), 0
        self.interrupted = False
        self.losses_unread: list[Tensor] = []  # of each step since the last reading: to minimise, and to show
        if resume is not None:
            self.device.load_optimizer(self.optimizer, resume["optimizer"])
            self.history, self.step = History.from_dict(resume["history"]), resume["step"]
            restore_rng(resume["rng"])
            self.device.set_rng_state(resume.get("device_rng"))

    @classmethod
    def resume(cls, folder: str | Path, device: Device | None = None) -> Trainer:
        """The run whose checkpoint is in ``folder``, where it stood."""
        state = load_checkpoint(folder)
        prepare_folder(folder, "--resume")
        return cls(Config.from_dict(state["config"]), folder, state, device)

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
        self._read_losses()
        state = {
            "config": self.config.to_dict(),
            "model": on_cpu(self.model.state_dict()),
            "optimizer": on_cpu(self.optimizer.state_dict()),
            "step": self.step,
            "history": self.history.to_dict(),
        }
        if (rng := self.device.rng_state()) is not None:
            state["device_rng"] = rng
        return save_checkpoint(self.folder, state)

    @property
    def examples_per_second(self) -> float:
        """Training pairs per second of training time, evaluation not counted."""
        return sum(self.history.pairs) / max(sum(self.history.seconds), 1e-9)

    @property
    def model_on_cpu(self) -> Aligner:
        """The model, or a copy of it, on the CPU."""
        if self.device.name == "cpu":
            return self.model
        copy = Aligner(self.config)
        copy.load_state_dict(on_cpu(self.model.state_dict()))
        return copy

    def _advance(self) -> str:
        began = time.perf_counter()
        batch = self.sampler.batch(self.step)
        self.train_on(batch)
        self.history.pairs.append(len(batch.pairs))
        self.history.seconds.append(0.0)
        if len(self.losses_unread) >= self.device.read_every:
            self._read_losses()
        self.history.seconds[-1] = time.perf_counter() - began
        recent = self.history.loss[-50:]
        loss = f"loss {sum(recent) / len(recent):.3f}, " if recent else ""
        return f"{loss}{self.examples_per_second:.1f} pairs/s"

    def train_on(self, batch: Batch) -> None:
        """One step: forward, backward, update."""
        placed = self.device.place(batch, self.config.batch_size, self.config.cap, learning=True)
        self.device.set_rate(self.optimizer, learning_rate(self.config, self.step))
        self.model.train()
        with self.device.precision():
            plans = self.model(placed.batch)
        loss, shown = self.device.losses(plans, placed, self.config.barycentre_weight)
        if self.device.read_every == 1:
            self._check(loss, self.step)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses_unread.append(torch.stack([loss.detach(), shown]))
        self.device.finish_step()
        self.step += 1

    def _read_losses(self) -> None:
        """Wait for the device, and write down the losses of the steps since the last time."""
        if not self.losses_unread:
            return
        losses = torch.stack([pair.cpu() for pair in self.losses_unread])
        self.losses_unread = []
        for step, (loss, _) in enumerate(losses, start=self.step - len(losses)):
            self._check(loss, step)
        self.history.loss += losses[:, 1].tolist()

    def _check(self, loss: Tensor, step: int) -> None:
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}; lower --learning-rate")

    def _evaluate_if_due(self, progress: bool) -> None:
        # Asked before the first step too: a run stopped in the middle of an evaluation makes up for it on resuming.
        scheduled = self.step % self.config.eval_every == 0 or self.step in (EARLY, self.config.steps)
        if not scheduled or (self.history.evaluations and self.history.evaluations[-1][0] == self.step):
            return
        self._read_losses()
        with contextlib.suppress(Interrupted):
            scores = score_model(
                self.model,
                self.dataset.heldout.pairs,
                self.config.decode_threshold,
                device=self.device,
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
