"""A run's log for TensorBoard: ``tensorboard --logdir runs``."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.image import imread

from .evaluate import Scores
from .pairs import Pair

FOLDER = "tensorboard"


class TensorBoardLog:
    """Appends to ``folder/tensorboard``; what an earlier process logged from ``step`` on is marked as void.

    Raises:
        ValueError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("logging needs tensorboard: pip install tensorboard, or --no-tensorboard") from error
        self._writer = SummaryWriter(str(folder / FOLDER), purge_step=step)

    def training(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of a training step."""
        self._scalars("training", step, values)

    def evaluation(self, step: int, scores: Scores) -> None:
        """The macro means of an evaluation."""
        self._scalars("held out", step, scores.macro)
        self._writer.flush()

    def plan(self, step: int, pair: Pair, plan: npt.NDArray[np.floating]) -> None:
        """The picture of a plan [n+1, m+1]."""
        from .plots import plot_plan  # plots reads train's history, and train logs here

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "plan.png"
            plot_plan(pair, plan, path)
            image = imread(path)
        self._writer.add_image("plan", image, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()

    def _scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)
