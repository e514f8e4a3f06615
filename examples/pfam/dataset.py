"""The families of a run: what is trained on, what is held out, and the pairs it is evaluated on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from .config import Config
from .pairs import EvaluationSet, Family, evaluation_pairs, load_families
from .stockholm import Alignment, read_stockholm

# Not the run's seed: runs that differ in their seed are compared on the same pairs.
_PAIR_SEED = 0


@dataclass(frozen=True)
class Dataset:
    """``dropped`` are training families left out because the evaluation holds the same family."""

    train: tuple[Family, ...]
    heldout_families: tuple[Family, ...]
    heldout: EvaluationSet
    dropped: tuple[str, ...]

    def summary(self) -> str:
        """What the run will train and be evaluated on, in a few lines."""
        names = [family.key for family in self.heldout_families]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        lines = [
            f"training: {len(self.train)} families, {sum(len(f.sequences) for f in self.train)} sequences",
            f"held out: {len(names)} families ({shown}), {len(self.heldout.pairs)} pairs",
        ]
        if self.heldout.skipped:
            lines.append(f"skipped:  {self.heldout.skipped} held-out pairs beyond the length cap")
        if self.dropped:
            lines.append(f"dropped from training, being held out: {', '.join(self.dropped)}")
        return "\n".join(lines)


def load_dataset(config: Config) -> Dataset:
    """Read, split by family, and draw the evaluation pairs."""
    train = _families(config.data, config)
    dropped: list[str] = []
    if config.eval_data is None:
        if len(train) < 2:
            raise ValueError(
                f"{config.data} holds {len(train)} families with two or more sequences; holding some out takes two "
                "(or give the held-out ones with --eval-data)"
            )
        order = np.random.default_rng(config.seed).permutation(len(train))
        cut = min(max(round(config.holdout * len(train)), 1), len(train) - 1)
        heldout = [train[index] for index in sorted(order[:cut])]
        train = [train[index] for index in sorted(order[cut:])]
    else:
        heldout = _families(config.eval_data, config)
        taken = {name for family in heldout for name in _identities(family)}
        dropped = [family.key for family in train if _identities(family) & taken]
        train = [family for family in train if not _identities(family) & taken]
    pairs = evaluation_pairs(heldout, config.eval_pairs, config.eval_cap, _PAIR_SEED)
    if not pairs.pairs:
        raise ValueError(f"no held-out pair to evaluate on ({pairs.skipped} skipped for length, cap {config.eval_cap})")
    return Dataset(tuple(train), tuple(heldout), pairs, tuple(dropped))


def _identities(family: Family) -> set[str]:
    """Name, and accession without its version: PF00041.20 is the same family as PF00041."""
    return {family.name, family.accession.split(".")[0]} - {""}


def _families(path: str, config: Config) -> list[Family]:
    def limited() -> Iterator[Alignment]:
        for index, alignment in enumerate(read_stockholm(path)):
            if config.max_families is not None and index >= config.max_families:
                return
            yield _first_rows(alignment, config.max_sequences)

    return load_families(limited())


def _first_rows(alignment: Alignment, count: int | None) -> Alignment:
    return replace(alignment, names=alignment.names[:count], rows=alignment.rows[:count])
