"""Everything that determines a training run, in one frozen object that is stored in its checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

_DATA = Path(__file__).parent / "data"
TRAIN_SAMPLE = _DATA / "train.sto.gz"
HELDOUT_SAMPLE = _DATA / "heldout.sto.gz"


@dataclass(frozen=True)
class Config:
    """A run; the same Config gives the same model, bit for bit, on the same machine.

    Args:
        data: Stockholm file or directory to train on.
        eval_data: Stockholm file or directory of the held-out families; None holds out ``holdout`` of ``data``.
        holdout: fraction of the families held out when there is no ``eval_data``.
        max_families, max_sequences: read no more than this many families, and rows of each; None reads all.
        cap, eval_cap: longest side of a training pair (longer ones are cropped), of an evaluation pair (skipped).
        eval_pairs: evaluation pairs per held-out family.
        batch_size, batch_cells: most pairs, and most plan entries, in a batch.
        base_iters, tail_iters: T and R of every attention.
        rounds: how often the second attention is repeated in evaluation.
        barycentre_weight: weight of ``objective.barycentre_loss`` in the training loss, per residue.
        decode_threshold: the expected-accuracy decoder adds a pair only above this plan entry.
    """

    data: str = str(TRAIN_SAMPLE)
    eval_data: str | None = str(HELDOUT_SAMPLE)
    holdout: float = 0.1
    max_families: int | None = None
    max_sequences: int | None = None
    seed: int = 0
    steps: int = 450
    batch_size: int = 6
    batch_cells: int = 320_000
    cap: int = 224
    eval_cap: int = 400
    eval_pairs: int = 20
    eval_every: int = 150
    save_every: int = 100
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup: int = 50
    barycentre_weight: float = 0.15
    mutation_rate: float = 0.3
    indels: float = 1.0
    dim: int = 64
    dropout: float = 0.1
    base_iters: int = 20
    tail_iters: int = 2
    rounds: int = 3
    decode_threshold: float = 0.02

    def __post_init__(self) -> None:
        positive = (
            "steps",
            "batch_size",
            "batch_cells",
            "cap",
            "eval_cap",
            "eval_pairs",
            "eval_every",
            "save_every",
            "dim",
            "rounds",
        )
        for name in (*positive, "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout must be a fraction between 0 and 1, got {self.holdout}")
        for name in ("mutation_rate", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")

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
