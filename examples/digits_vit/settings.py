"""Everything that determines a run: the command line's defaults, checks and help."""

from __future__ import annotations

from dataclasses import dataclass

from examples.common.settings import Range, check_settings, setting


@dataclass(frozen=True)
class Settings:
    """A run; the same Settings give the same numbers, but for the times, on the same machine and thread count."""

    epochs: int = setting(40, Range(1, 10_000), "passes over the training images")
    seeds: int = setting(3, Range(1, 100), "how often everything is repeated, with seeds 0, 1, ...")
    batch_size: int = setting(64, Range(1, 10_000), "images in a batch")
    learning_rate: float = setting(4e-3, Range(0, 1, "(]"), "peak learning rate of AdamW")
    epsilon: float = setting(1.0, Range(0.01, 100), "entropic regularisation of the Sinkhorn attention")
    base_iters: int = setting(
        10, Range(0, 1000), "T of the Sinkhorn attention: iterations before the two that are differentiated"
    )
    dustbin: bool = False

    def __post_init__(self) -> None:
        check_settings(self)
