"""Everything that determines a training run, in one frozen object that is stored in its checkpoints."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

_DATA = Path(__file__).parent / "data"
TRAIN_SAMPLE = _DATA / "train.sto.gz"
HELDOUT_SAMPLE = _DATA / "heldout.sto.gz"


@dataclass(frozen=True)
class Range:
    """The finite numbers from ``low`` to ``high``; ``ends`` says which of the two belong, as in [0, 1)."""

    low: float
    high: float = math.inf
    ends: str = "[]"

    def __contains__(self, value: float) -> bool:
        above = self.low <= value if self.ends[0] == "[" else self.low < value
        below = value <= self.high if self.ends[1] == "]" else value < self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        text = f"{'at least' if self.ends[0] == '[' else 'above'} {self.low}"
        return text + (
            f" and {'at most' if self.ends[1] == ']' else 'below'} {self.high}" if self.high < math.inf else ""
        )

    def check(self, option: str, value: float) -> None:
        """Raise ValueError unless ``value`` belongs."""
        if value not in self:
            raise ValueError(f"{option} must be {self}, got {value}")


def option_name(name: str) -> str:
    """The command line's name of a setting."""
    return f"--{name.replace('_', '-')}"


def _number(default: float | None, allowed: Range, meaning: str) -> Any:
    return field(default=default, metadata={"allowed": allowed, "meaning": meaning})


_COUNT, _FRACTION = Range(1), Range(0, 1, "[)")


@dataclass(frozen=True)
class Config:
    """A run; the same Config gives the same model, bit for bit, on the same machine.

    The numbers carry their allowed range and their meaning, which are also the command line's checks and help.

    Args:
        data: Stockholm file or directory to train on.
        eval_data: Stockholm file or directory of the held-out families; None holds out ``holdout`` of ``data``.
    """

    data: str = str(TRAIN_SAMPLE)
    eval_data: str | None = str(HELDOUT_SAMPLE)
    holdout: float = _number(0.1, Range(0, 1, "()"), "fraction of the families held out when there is no --eval-data")
    max_families: int | None = _number(None, _COUNT, "read no more families than this")
    max_sequences: int | None = _number(None, Range(2), "read no more sequences of a family than this")
    seed: int = _number(0, Range(0, 2**32 - 1), "seed of the initial weights, the batches and the dropout")
    steps: int = _number(450, _COUNT, "training steps")
    batch_size: int = _number(6, _COUNT, "most pairs in a batch")
    batch_cells: int = _number(320_000, _COUNT, "most plan entries in a batch")
    cap: int = _number(224, Range(16), "longest side of a training pair, longer ones are cropped")
    eval_cap: int = _number(400, _COUNT, "longest side of an evaluation pair, longer ones are skipped")
    eval_pairs: int = _number(20, _COUNT, "evaluation pairs per held-out family")
    eval_every: int = _number(150, _COUNT, "steps between evaluations")
    save_every: int = _number(100, _COUNT, "steps between checkpoints")
    learning_rate: float = _number(3e-3, Range(0, 1, "(]"), "peak learning rate of AdamW")
    weight_decay: float = _number(0.01, Range(0), "weight decay of AdamW")
    warmup: int = _number(50, Range(0), "steps of linear warm-up of the learning rate")
    barycentre_weight: float = _number(0.15, Range(0), "weight of the barycentre loss, per residue")
    mutation_rate: float = _number(0.3, _FRACTION, "each side of a pair is mutated at a rate up to this")
    indels: float = _number(1.0, Range(0, 100), "inserted or deleted runs per hundred residues and side")
    dim: int = _number(64, Range(21), "width of the tokens")
    dropout: float = _number(0.1, _FRACTION, "dropout in the context blocks")
    base_iters: int = _number(20, Range(0), "T of every attention: Sinkhorn iterations before the tail")
    tail_iters: int = _number(2, Range(0), "R of every attention: iterations differentiated exactly")
    window: int | None = _number(None, Range(0), "tokens to either side of the scaled diagonal that may be aligned")
    rounds: int = _number(3, _COUNT, "how often the second attention is repeated in evaluation")
    decode_threshold: float = _number(0.02, _FRACTION, "the decoder adds a pair only above this plan entry")

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.metadata and not (value is None and setting.default is None):
                setting.metadata["allowed"].check(option_name(setting.name), value)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The inverse of ``to_dict``; an unknown name means that another version wrote it."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown settings in the checkpoint: {', '.join(sorted(unknown))}")
        return cls(**values)
