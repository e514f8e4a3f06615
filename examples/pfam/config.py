"""Everything that determines a training run, in one frozen object that is stored in its checkpoints."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .text import clip, visible

_DATA = Path(__file__).parent / "data"
TRAIN_SAMPLE = _DATA / "train.sto.gz"
HELDOUT_SAMPLE = _DATA / "heldout.sto.gz"
_HUGE = 10**300
_VAST = 10**9
_VAST_AREA = _VAST**2  # of plan entries, which are products of two lengths
"""Bounds that only those who exceed them are told of."""


@dataclass(frozen=True)
class Range:
    """The finite numbers from ``low`` to ``high``; ``ends`` says which of the two belong, as in [0, 1)."""

    low: float
    high: float = math.inf
    ends: str = "[]"

    def __contains__(self, value: float) -> bool:
        if isinstance(value, int):  # of hundreds of digits it is no float
            value = min(max(value, -_HUGE), _HUGE)
        above = self.low <= value if self.ends[0] == "[" else self.low < value
        below = value <= self.high if self.ends[1] == "]" else value < self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        text = f"{'at least' if self.ends[0] == '[' else 'above'} {self.low}"
        return text + (
            f" and {'at most' if self.ends[1] == ']' else 'below'} {self.high}"
            if self.high not in (_VAST, _VAST_AREA, math.inf)
            else ""
        )

    def check(self, option: str, value: float) -> None:
        """Raise ValueError unless ``value`` belongs."""
        if value not in self:
            hidden = self.high in (_VAST, _VAST_AREA)
            allowed = f"{self} and at most {self.high}" if hidden and self.high < value else str(self)
            raise ValueError(f"{option} must be {allowed}, got {clip(str(value))}")


@dataclass(frozen=True)
class Choice:
    """One of several names."""

    names: tuple[str, ...]

    def check(self, option: str, value: str) -> None:
        """Raise ValueError unless ``value`` is one of them."""
        if value not in self.names:
            raise ValueError(f"{option} must be one of {', '.join(self.names)}, got {value!r}")


def option_name(name: str) -> str:
    """The command line's name of a setting."""
    return f"--{name.replace('_', '-')}"


def _number(default: float | None, allowed: Range, meaning: str) -> Any:
    return field(default=default, metadata={"allowed": allowed, "meaning": meaning})


def _choice(default: str, allowed: Choice, meaning: str) -> Any:
    return field(default=default, metadata={"allowed": allowed, "meaning": meaning})


_COUNT, _FRACTION, _ANY_COUNT = Range(1, _VAST), Range(0, 1, "[)"), Range(0, _VAST)
_CELLS = Range(1, _VAST_AREA)
# A released file holds settings that somebody else chose: what they may cost has bounds.
_WIDTH, _ROUNDS = 1024, Range(1, 8)
_KINDS = {"int": (int,), "float": (int, float), "str": (str,)}


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
    holdout: float = _number(0.1, Range(0, 1, "()"), "share of the families, 200 at most, held out without --eval-data")
    stream_from: int = _number(16, _ANY_COUNT, "megabytes of data from which they are read from disk, not memory")
    max_families: int | None = _number(None, _COUNT, "read no more families than this")
    max_sequences: int | None = _number(None, Range(2, _VAST), "read no more sequences of a family than this")
    seed: int = _number(0, Range(0, 2**32 - 1), "seed of the initial weights, the batches and the dropout")
    steps: int = _number(200, _COUNT, "training steps")
    batch_size: int = _number(6, _COUNT, "pairs in a batch, over all processes")
    batch_cells: int = _number(320_000, _CELLS, "most plan entries computed at once; larger batches go in parts")
    pool: int = _number(4, _COUNT, "pairs of so many steps are sorted by length: more, less padding, more like batches")
    cap: int = _number(160, Range(16, _VAST), "longest side of a training pair, longer ones are cropped")
    eval_cap: int = _number(400, _COUNT, "longest side of an evaluation pair, longer ones are skipped")
    eval_pairs: int = _number(20, _COUNT, "evaluation pairs per held-out family")
    eval_every: int = _number(100, _ANY_COUNT, "steps between evaluations; 0: one, at the end")
    save_every: int = _number(100, _COUNT, "steps between checkpoints")
    learning_rate: float = _number(3e-3, Range(0, 1, "(]"), "peak learning rate of AdamW")
    weight_decay: float = _number(0.1, Range(0), "weight decay of AdamW")
    warmup: int = _number(50, _ANY_COUNT, "steps of linear warm-up of the learning rate")
    barycentre_weight: float = _number(0.1, Range(0), "weight of the barycentre loss, per residue")
    mutation_rate: float = _number(0.6, _FRACTION, "each side of a pair is mutated at a rate up to this")
    indels: float = _number(0.5, Range(0, 100), "inserted or deleted runs per hundred residues and side")
    dim: int = _number(64, Range(21, _WIDTH), "width of the tokens")
    dropout: float = _number(0.25, _FRACTION, "dropout in the context blocks")
    heads: int = _number(4, Range(1, 64), "learned projections whose inner products are compared")
    hidden: int = _number(24, Range(1, _WIDTH), "width of the perceptrons that judge a pair of residues")
    attention: str = _choice("sinkhorn", Choice(("sinkhorn", "softmax", "dual-softmax")), "how scores become a plan")
    base_iters: int = _number(40, Range(0, 10_000), "T of every attention: Sinkhorn iterations before the tail")
    tail_iters: int = _number(2, Range(0, 1000), "R of every attention: iterations differentiated exactly")
    window: int | None = _number(None, _ANY_COUNT, "tokens to either side of the scaled diagonal that may be aligned")
    gradient: str = _choice("implicit", Choice(("tail", "implicit", "unrolled")), "what is differentiated")
    capacity: str = _choice("full", Choice(("full", "one")), "what the dustbin can take: all, or one residue a side")
    gaps: str = _choice("affine", Choice(("affine", "single")), "whether gaps are seen as runs (a pair HMM) or not")
    relaxation: float | None = _number(None, Range(0, ends="(]"), "strength of a KL penalty in place of exact masses")
    train_rounds: int = _number(2, _ROUNDS, "how often the second attention is repeated in training")
    rounds: int = _number(2, _ROUNDS, "the same in evaluation")

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            _check_kind(setting.name, str(setting.type), value)
            if setting.metadata and not (value is None and setting.default is None):
                setting.metadata["allowed"].check(option_name(setting.name), value)
        if self.attention != "sinkhorn" and (self.capacity != "full" or self.relaxation is not None):
            raise ValueError(f"--capacity and --relaxation are Sinkhorn's: {self.attention} has no masses to keep")

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The inverse of ``to_dict``; a setting that is unknown or lacking means that another version wrote it."""
        if not isinstance(values, dict):
            raise TypeError(f"settings must be values by their names, got {clip(repr(values))}")
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            names = clip(visible(", ".join(sorted(map(str, unknown)))), 200)
            raise ValueError(f"unknown settings in the checkpoint: {names}")
        missing = {field.name for field in fields(cls) if field.metadata} - set(values)
        if missing:
            raise ValueError(f"settings that the checkpoint lacks: {', '.join(sorted(missing))}")
        return cls(**values)


def _check_kind(name: str, kind: str, value: Any) -> None:
    first, _, optional = kind.partition(" | ")
    right = isinstance(value, _KINDS[first]) and not isinstance(value, bool)
    if right or (optional and value is None):
        return
    raise TypeError(f"{option_name(name)} must be {kind.replace('None', 'nothing')}, got {clip(repr(value))}")
