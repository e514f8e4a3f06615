"""The tables a run ends with, as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import mean, stdev

import numpy as np

from examples.common.tables import table

from .data import Split
from .measure import Outcome
from .model import SOFTMAX
from .settings import Settings

_SPREAD = "after ±: the standard deviation over the seeds"
_QUANTILES = (0.0, 0.01, 0.5, 0.99, 1.0)


def write_report(settings: Settings, split: Split, outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """All tables of ``outcomes``, which holds one Outcome per seed under each attention's name."""
    parts = [score_table(outcomes), *differences(outcomes, len(split.test)), reading_table(outcomes)]
    used = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in asdict(settings).items())
    return "\n\n".join([f"{used}\n{split.summary()}\n{_SPREAD}", *parts])


def score_table(outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """Accuracy, loss, time and size; mean and standard deviation over the seeds."""
    header = ["attention", "test accuracy, %", "test loss", "training, s", "ms per step", "parameters"]
    rows = [
        [
            name,
            spread([100 * o.test.accuracy for o in of_seeds], 2),
            spread([o.test.loss for o in of_seeds], 3),
            spread([o.seconds for o in of_seeds], 1),
            spread([o.milliseconds_per_step for o in of_seeds], 1),
            str(of_seeds[0].parameters),
        ]
        for name, of_seeds in outcomes.items()
    ]
    return table(header, rows)


def differences(outcomes: Mapping[str, Sequence[Outcome]], size: int) -> list[str]:
    """A line for each attention but softmax: its accuracy minus softmax's, seed by seed; ``size`` test digits."""
    lines = []
    for name, of_seeds in outcomes.items():
        if name != SOFTMAX:
            gaps = [
                100 * (o.test.accuracy - base.test.accuracy)
                for o, base in zip(of_seeds, outcomes[SOFTMAX], strict=True)
            ]
            each = ", ".join(f"{gap:+.2f}" for gap in gaps)
            lines.append(
                f"{name} minus {SOFTMAX}: {spread(gaps, 2)} points of accuracy (seed by seed {each}; "
                f"one image is {100 / size:.2f})"
            )
    return lines


def reading_table(outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """Quantiles, over test digits, heads, patches and seeds, of the attention a patch receives in block 1."""
    rows = []
    for name, of_seeds in outcomes.items():
        values = np.concatenate([o.reading.flatten().numpy() for o in of_seeds])
        rows.append([name, *(f"{value:.2f}" for value in np.quantile(values, _QUANTILES))])
    return table(["attention a patch receives (even: 1)", "least", "1 %", "median", "99 %", "most"], rows)


def spread(values: Sequence[float], digits: int) -> str:
    """``mean ± standard deviation``, or the value if there is only one."""
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {stdev(values):.{digits}f}"
