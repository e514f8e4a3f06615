"""The training loop: a pure function of its Config, interruptible and resumable at any step."""

from __future__ import annotations

import contextlib
import math
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.common.files import CHECKPOINT, prepare_folder

from .checkpoint import load_checkpoint, restore_rng, restoring, save_checkpoint
from .config import Config
from .dataset import Dataset, load_dataset
from .device import Device, on_cpu
from .distributed import Processes
from .evaluate import Interrupted, Scores, align_pairs, score_model
from .hmm_alone import HmmAlone
from .loader import drawn_ahead
from .model import Aligner, Output
from .pairs import Pair
from .profiles import shipped
from .sampler import Batch, PairSampler, collate, padding
from .source import MOST_TEXT
from .tensorboard_log import TensorBoardLog

EARLY = 50
"""One evaluation more, at this step: most is learned before the second one of the schedule."""


@dataclass
class History:
    """Everything logged: per step (loss, pairs, seconds, padding), and per evaluation (step, scores).

    Of a step of several processes, the seconds and the padding are the first one's.
    """

    loss: list[float] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, Scores]] = field(default_factory=list)
    padding: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> History:
        evaluations = [(step, Scores(**scores)) for step, scores in values["evaluations"]]
        return cls(**{**values, "evaluations": evaluations})


class Trainer:
    """Model, optimizer, data and history of one run; ``run`` continues from wherever they are.

    Args:
        config: the run.
        folder: where checkpoints go.
        resume: state of a checkpoint, from ``load_checkpoint``; of any device.
        device: where to compute, the CPU by default.
        processes: those that share the run, from ``distributed.join``; their number is not part of the config, and
            changes nothing but the order of sums and the dropout.
        workers: processes that draw batches ahead; 0 draws them between the steps.
        cache, max_text: folder of the stores of large data, and how much is read; see ``load_dataset``.
        tensorboard: log to ``folder/tensorboard``.
    """

    def __init__(
        self,
        config: Config,
        folder: str | Path,
        resume: dict[str, Any] | None = None,
        device: Device | None = None,
        *,
        processes: Processes | None = None,
        workers: int = 0,
        cache: str | Path | None = None,
        max_text: float = MOST_TEXT,
        tensorboard: bool = False,
    ) -> None:
        self.config, self.folder, self.device = config, Path(folder), device or Device()
        self.processes, self.workers, self.tensorboard = processes or Processes(), workers, tensorboard
        random.seed(config.seed)
        np.random.seed(config.seed)
        torch.manual_seed(config.seed)
        with self.processes.first_alone():
            self.dataset: Dataset = load_dataset(config, cache, max_text)
        self.sampler = PairSampler(
            self.dataset.train,
            size=config.batch_size,
            cells=config.batch_cells,
            cap=config.cap,
            mutation_rate=config.mutation_rate,
            indels=config.indels,
            flanked=config.flanked,
            unrelated=config.unrelated,
            seed=config.seed,
            pool=config.pool,
            rank=self.processes.rank,
            world=self.processes.world,
        )
        self.model = Aligner(config, loaded=resume is not None)
        self.profiled_on: list[list[str]] = []
        if resume is None and self.model.encoder.profile is not None:
            self.profiled_on = [list(family) for family in shipped().families]
        if resume is not None:
            self._check_precision(resume.get("precision"))
            with restoring(folder):
                self.model.load_state_dict(resume["model"])
                self.profiled_on = list(resume.get("profiled_on", []))
        self.device.model(self.model)
        self.optimizer = self.device.optimizer(self.model.parameters(), config.learning_rate, config.weight_decay)
        self.history, self.step = History(), 0
        self.interrupted = False
        self.losses_unread: list[Tensor] = []  # of each step since the last reading: to minimise, and to show
        self._log: TensorBoardLog | None = None
        if resume is not None:
            with restoring(folder):
                self.device.load_optimizer(self.optimizer, resume["optimizer"])
                self.history, self.step = History.from_dict(resume["history"]), int(resume["step"])
                restore_rng(resume["rng"])
                self.device.set_rng_state(resume.get("device_rng"))
        self.trained = self._shared()

    @classmethod
    def resume(cls, folder: str | Path, device: Device | None = None, **options: Any) -> Trainer:
        """The run whose checkpoint is in ``folder``, where it stood; ``options`` are the constructor's."""
        state = load_checkpoint(folder)
        prepare_folder(folder, "--resume")
        with restoring(folder):
            config = Config.from_dict(state["config"])
        return cls(config, folder, state, device, **options)

    def run(self, until: int | None = None, progress: bool = True) -> bool:
        """Train to step ``until`` (default: the end of the schedule); False if the user stopped it.

        Ctrl-C finishes the step in hand and saves; a second Ctrl-C stops at once, with the last checkpoint on disk.
        """
        until = self.config.steps if until is None else min(until, self.config.steps)
        with self._interruptible(), self._logging(), self._bar(progress) as bar, self._pairs(until) as pairs:
            self._evaluate_if_due(progress)
            while self.step < until and not self._stopped():
                bar.set_postfix_str(self._advance(pairs))
                bar.update()
                self._evaluate_if_due(progress)
                if self.step % self.config.save_every == 0:
                    self.save()
            self.save()
        return not self._stopped()

    def save(self) -> Path:
        """Write the checkpoint; its path. The first process does so."""
        self._read_losses()
        if not self.processes.first:
            return self.folder / CHECKPOINT
        state = {
            "config": self.config.to_dict(),
            "model": on_cpu(self.model.state_dict()),
            "optimizer": on_cpu(self.optimizer.state_dict()),
            "step": self.step,
            "history": self.history.to_dict(),
            "trained_on": self.dataset.trained_on,
            "profiled_on": self.profiled_on,
            "precision": self.device.precision_name,
        }
        if (rng := self.device.rng_state()) is not None:
            state["device_rng"] = rng
        return save_checkpoint(self.folder, state)

    @property
    def hmm_is_alone(self) -> bool:
        """Whether the next step trains nothing but the pair HMM."""
        return self.step < self.config.hmm_steps

    def _shared(self) -> nn.Module:
        """What is called in training now."""
        return self.processes.share_gradients(HmmAlone(self.model) if self.hmm_is_alone else self.model)

    @property
    def examples_per_second(self) -> float:
        """Training pairs per second of training time, evaluation not counted."""
        return sum(self.history.pairs) / max(sum(self.history.seconds), 1e-9)

    @property
    def model_on_cpu(self) -> Aligner:
        """The model, or a copy of it, on the CPU."""
        if self.device.name == "cpu":
            return self.model
        copy = Aligner(self.config, loaded=True)
        copy.load_state_dict(on_cpu(self.model.state_dict()))
        return copy

    def _pairs(self, until: int) -> AbstractContextManager[Iterator[list[Pair]]]:
        drawn = drawn_ahead(self.sampler.pairs, self.step, until, self.workers, self.device.start_method)
        return contextlib.closing(drawn)

    def _advance(self, pairs: Iterator[list[Pair]]) -> str:
        began = time.perf_counter()
        drawn = next(pairs)
        parts = (collate(drawn),) if self.device.one_shape else self.sampler.parts(drawn)
        self.train_on(*parts)
        self.history.pairs.append(self.config.batch_size)
        self.history.padding.append(padding(parts))
        self.history.seconds.append(0.0)
        if len(self.losses_unread) >= self.device.read_every:
            self._read_losses()
        self.history.seconds[-1] = time.perf_counter() - began
        recent = self.history.loss[-50:]
        loss = f"loss {sum(recent) / len(recent):.3f}, " if recent else ""
        return f"{loss}{self.examples_per_second:.1f} pairs/s, epoch {self.sampler.epoch(self.step):.2f}"

    def train_on(self, *parts: Batch) -> None:
        """One step: forward and backward of each part of the batch, then the update.

        Every pair weighs the same, whichever part or process it is in: the gradient is that of the whole batch.
        """
        self.device.set_rate(self.optimizer, learning_rate(self.config, self.step))
        self.device.seed(_mixed(self.config.seed, self.step, self.processes.rank))
        self.model.train()
        self.optimizer.zero_grad()
        losses = []
        for part in parts:
            last = part is parts[-1]
            with contextlib.nullcontext() if last else self.processes.keep_gradients(self.trained):
                losses.append(self._backward(part))
        total = torch.stack(losses).sum(0)
        if self.device.read_every == 1:
            self._check(total[0], self.step)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if self.device.read_every == 1:
            self._check(norm, self.step, "the gradient's norm")
        self.optimizer.step()
        self.losses_unread.append(total)
        self.device.finish_step()
        self.step += 1
        if self.step == self.config.hmm_steps:
            self.trained = self._shared()

    def _backward(self, part: Batch) -> Tensor:
        """Its share of the losses [2], to minimise and to show."""
        placed = self.device.place(part, self.config.batch_size, self.config.cap, learning=True)
        # Losses are means over the part's pairs, and gradients will be means over the processes.
        share = len(part.pairs) * self.processes.world / self.config.batch_size
        with self.device.precision():
            output = self.trained(placed.batch)
        if self.hmm_is_alone:
            scores, log_odds = output
            loss = share * self.device.hmm_loss(scores, log_odds, placed)
            loss.backward()
            return torch.stack([loss.detach()] * 2)
        # The plans may be in half precision.
        output = Output(output.first.float(), output.last.float(), *output[2:])
        loss, shown = self.device.losses(output, placed, self.config.barycentre_weight)
        (share * loss).backward()
        return share * torch.stack([loss.detach(), shown])

    def _read_losses(self) -> None:
        """Wait for the device, and write down the losses of the steps since the last time."""
        if not self.losses_unread:
            return
        losses = torch.stack([pair.cpu() for pair in self.losses_unread])
        losses = self.processes.total(losses) / self.processes.world
        self.losses_unread = []
        for step, (loss, _) in enumerate(losses, start=self.step - len(losses)):
            self._check(loss, step)
        self.history.loss += losses[:, 1].tolist()
        if self._log is not None:
            for step in range(self.step - len(losses), self.step):
                self._log.training(step, self._logged(step, float(losses[step - self.step, 0])))

    def _logged(self, step: int, objective: float) -> dict[str, float]:
        recent = slice(max(0, step - 24), step + 1)
        seconds, pairs = self.history.seconds[recent], self.history.pairs[recent]
        return {
            "loss": self.history.loss[step],
            "objective": objective,
            "learning rate": learning_rate(self.config, step),
            "pairs per second": sum(pairs) / max(sum(seconds), 1e-9),
            "padding": self.history.padding[step],
            "epoch": self.sampler.epoch(step),
        }

    def _stopped(self) -> bool:
        """Whether any process was asked to stop: all stop after the same step."""
        self.interrupted = self.processes.any(self.interrupted)
        return self.interrupted

    def _check_precision(self, before: str | None) -> None:
        if before not in (None, self.device.precision_name):
            raise ValueError(
                f"the run in {self.folder} computes its layers in {before}; go on with --precision {before}, not "
                f"{self.device.precision_name}"
            )

    def _check(self, value: Tensor, step: int, name: str = "the loss") -> None:
        if not torch.isfinite(value):
            raise FloatingPointError(f"{name} is {value.item()} at step {step}; lower --learning-rate")

    def _evaluate_if_due(self, progress: bool) -> None:
        # Asked before the first step too: a run stopped in the middle of an evaluation makes up for it on resuming.
        every = self.config.eval_every
        scheduled = self.step == self.config.steps or (every > 0 and (self.step % every == 0 or self.step == EARLY))
        if not scheduled or (self.history.evaluations and self.history.evaluations[-1][0] == self.step):
            return
        self._read_losses()
        if not self.processes.first:
            return
        pairs = self.dataset.heldout.pairs
        with contextlib.suppress(Interrupted):
            scores = score_model(
                self.model, pairs, device=self.device, progress=progress, stop=lambda: self.interrupted
            )
            self.history.evaluations.append((self.step, scores))
            if self._log is not None:
                self._log.evaluation(self.step, scores)
                ((pair, plan),) = align_pairs(self.model, pairs[:1], 1, self.device)
                self._log.plan(self.step, pair, plan)

    @contextlib.contextmanager
    def _logging(self) -> Iterator[None]:
        if not (self.tensorboard and self.processes.first):
            yield
            return
        self._log = TensorBoardLog(self.folder, self.step)
        try:
            yield
        finally:
            self._log.close()
            self._log = None

    def _bar(self, progress: bool) -> tqdm[NoReturn]:
        shown = progress and self.processes.first
        return tqdm(total=self.config.steps, initial=self.step, desc="training", disable=not shown)

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        def handler(number: int, frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            if not self.processes.first:
                return
            with contextlib.suppress(RuntimeError):  # the signal came in the middle of another write
                tqdm.write("stopping after this step; Ctrl-C again stops now", file=sys.stderr)

        previous = signal.signal(signal.SIGINT, handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


def _mixed(*numbers: int) -> int:
    """A seed that differs wherever one of the numbers does."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then a cosine to a fiftieth of the peak; for the pair HMM alone, and for all of it again."""
    steps = config.steps - config.hmm_steps
    if step < config.hmm_steps:
        steps = config.hmm_steps
    else:
        step -= config.hmm_steps
    warm = min(1.0, (step + 1) / max(config.warmup, 1))
    return config.learning_rate * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
