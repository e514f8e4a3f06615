"""Everything that determines a run, with its limits: the command line's defaults, checks and help."""

from __future__ import annotations

from dataclasses import dataclass

from examples.pfam.config import Range, option_name

# name: (what is allowed, what it means)
LIMITS = {
    "epochs": (Range(1, 10_000), "passes over the training images"),
    "seeds": (Range(1, 100), "how often everything is repeated, with seeds 0, 1, ..."),
    "batch_size": (Range(1, 10_000), "images in a batch"),
    "learning_rate": (Range(0, 1, "(]"), "peak learning rate of AdamW"),
    "epsilon": (Range(0.01, 100), "entropic regularisation of the Sinkhorn attention"),
    "base_iters": (Range(0, 1000), "T of the Sinkhorn attention: iterations before the two that are differentiated"),
}


@dataclass(frozen=True)
class Settings:
    """A run; the same Settings give the same numbers, but for the times, on the same machine and thread count."""

    epochs: int = 40
    seeds: int = 3
    batch_size: int = 64
    learning_rate: float = 4e-3
    epsilon: float = 1.0
    base_iters: int = 10
    dustbin: bool = False

    def __post_init__(self) -> None:
        for name, (allowed, _) in LIMITS.items():
            allowed.check(option_name(name), getattr(self, name))
