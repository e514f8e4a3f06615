"""Everything that determines a training run, in one frozen object that is stored in its checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from examples.common.settings import VAST, VAST_AREA, Choice, Range, check_settings, option_name, setting
from examples.common.text import clip, visible

_DATA = Path(__file__).parent / "data"
TRAIN_SAMPLE = _DATA / "train.sto.gz"
HELDOUT_SAMPLE = _DATA / "heldout.sto.gz"
_COUNT, _FRACTION, _ANY_COUNT = Range(1, VAST), Range(0, 1, "[)"), Range(0, VAST)
_CELLS = Range(1, VAST_AREA)
# A released file holds settings that somebody else chose: what they may cost has bounds.
_WIDTH, _ROUNDS = 1024, Range(1, 8)
GAPS = ("two-piece", "affine", "fitted", "single")
KIN = ("mixed", "wide", "one")
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
    holdout: float = setting(0.1, Range(0, 1, "()"), "share of the families, 200 at most, held out without --eval-data")
    stream_from: int = setting(16, _ANY_COUNT, "megabytes of data from which they are read from disk, not memory")
    max_families: int | None = setting(None, _COUNT, "read no more families than this")
    max_sequences: int | None = setting(None, Range(2, VAST), "read no more sequences of a family than this")
    seed: int = setting(0, Range(0, 2**32 - 1), "seed of the initial weights, the batches and the dropout")
    steps: int = setting(200, _COUNT, "training steps")
    hmm_steps: int = setting(0, _ANY_COUNT, "steps, the first ones of all, that train the pair HMM alone")
    batch_size: int = setting(6, _COUNT, "pairs in a batch, over all processes")
    batch_cells: int = setting(320_000, _CELLS, "most plan entries computed at once; larger batches go in parts")
    pool: int = setting(4, _COUNT, "pairs of so many steps are sorted by length: more, less padding, more like batches")
    cap: int = setting(160, Range(16, VAST), "longest side of a training pair, longer ones are cropped")
    eval_cap: int = setting(400, _COUNT, "longest side of an evaluation pair, longer ones are skipped")
    eval_pairs: int = setting(20, _COUNT, "evaluation pairs per held-out family")
    eval_every: int = setting(100, _ANY_COUNT, "steps between evaluations; 0: one, at the end")
    save_every: int = setting(100, _COUNT, "steps between checkpoints")
    learning_rate: float = setting(3e-3, Range(0, 1, "(]"), "peak learning rate of AdamW")
    weight_decay: float = setting(0.1, Range(0), "weight decay of AdamW")
    warmup: int = setting(50, _ANY_COUNT, "steps of linear warm-up of the learning rate")
    barycentre_weight: float = setting(0.1, Range(0), "weight of the barycentre loss, per residue")
    mutation_rate: float = setting(0.6, _FRACTION, "each side of a pair is mutated at a rate up to this")
    indels: float = setting(0.5, Range(0, 100), "inserted or deleted runs per hundred residues and side")
    flanked: float = setting(0.5, Range(0, 1), "share of the pairs that are set between flanks they do not share")
    unrelated: float = setting(0.1, Range(0, 1), "share of the pairs of sequences that have nothing in common")
    dim: int = setting(64, Range(21, _WIDTH), "width of the tokens")
    dropout: float = setting(0.25, _FRACTION, "dropout in the context blocks")
    heads: int = setting(4, Range(1, 64), "learned projections whose inner products are compared")
    hidden: int = setting(24, Range(1, _WIDTH), "width of the perceptrons that judge a pair of residues")
    attention: str = setting("sinkhorn", Choice(("sinkhorn", "softmax", "dual-softmax")), "how scores become a plan")
    base_iters: int = setting(40, Range(0, 10_000), "T of every attention: Sinkhorn iterations before the tail")
    tail_iters: int = setting(2, Range(0, 1000), "R of every attention: iterations differentiated exactly")
    window: int | None = setting(None, _ANY_COUNT, "tokens to either side of the scaled diagonal that may be aligned")
    gradient: str = setting("implicit", Choice(("tail", "implicit", "unrolled")), "what is differentiated")
    capacity: str = setting("full", Choice(("full", "one")), "what the dustbin can take: all, or one residue a side")
    profiles: str = setting("context", Choice(("context", "none")), "what relatives' residues are foretold from")
    gaps: str = setting("two-piece", Choice(GAPS), "what they cost in the pair HMM; single: there is none")
    kin: str = setting(
        "mixed", Choice(KIN), "pair HMMs that are averaged: for relatives near and remote, further apart, or one"
    )
    relaxation: float | None = setting(None, Range(0, ends="(]"), "strength of a KL penalty in place of exact masses")
    train_rounds: int = setting(2, _ROUNDS, "how often the second attention is repeated in training")
    rounds: int = setting(2, _ROUNDS, "the same in evaluation")

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_kind(field.name, str(field.type), getattr(self, field.name))
        check_settings(self)
        if self.flanked + self.unrelated > 1:
            raise ValueError(f"--flanked {self.flanked:g} and --unrelated {self.unrelated:g} are more than all pairs")
        if self.hmm_steps and (self.hmm_steps >= self.steps or self.gaps == "single"):
            raise ValueError(
                f"--hmm-steps {self.hmm_steps} are the first of --steps {self.steps}, some of which the attentions "
                "need, and train what --gaps single has not"
            )
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
