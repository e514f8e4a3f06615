"""Batches of one shape, for devices that compile a program per shape: lengths and targets are data, all else is fixed.

The objective is `objective`'s, read token by token: no list of entries whose length changes, no gather and scatter,
which devices that split a batch among them would have to talk about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .metrics import LOG_FLOOR, unmatched
from .model import Output
from .objective import FIRST_STAGE_WEIGHT, RUNS_WEIGHT, UNRELATED_RESIDUES, centres
from .pairs import Pair
from .sampler import PADDING, Batch, collate

BUCKET = 128
"""Padded lengths are multiples of this: a TPU works on 128 lanes, and fewer shapes are fewer compilations."""


@dataclass(frozen=True)
class Targets:
    """What is known of each token. `partner` is the other side's index, its padded length for the dustbin.

    Attributes:
        row_partner, col_partner: [N, L], [N, S] int32; -1 where there is nothing to learn.
        row_weight, col_weight: [N, L], [N, S] weight of the entry in the mean negative log plan; a matched pair counts
            with its row, and its column has weight 0.
        row_aligned, col_aligned: [N, L], [N, S] weight of the token in the barycentre loss.
        share: [N] weight of a residue of the pair, 1 / (n + m) over the number of pairs, to the pair HMM.
    """

    row_partner: Tensor
    col_partner: Tensor
    row_weight: Tensor
    col_weight: Tensor
    row_aligned: Tensor
    col_aligned: Tensor
    share: Tensor

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


def bucketed(longest: int) -> int:
    """The padded length of a side."""
    return -(-longest // BUCKET) * BUCKET


def padded(batch: Batch, size: int, length: int) -> Batch:
    """The batch with `size` pairs of `length` residues a side, int32; copies of the first pair fill it up.

    Raises:
        ValueError: the batch is larger.
    """
    if len(batch.pairs) > size or max(batch.query.shape[1], batch.key.shape[1]) > length:
        raise ValueError(f"{len(batch.pairs)} pairs of {batch.query.shape[1]} x {batch.key.shape[1]} exceed the shape")
    pairs = [*batch.pairs, *[batch.pairs[0]] * (size - len(batch.pairs))]
    full = batch if len(pairs) == len(batch.pairs) else collate(pairs)

    def pad(side: Tensor) -> Tensor:
        return F.pad(side, (0, length - side.shape[1]), value=PADDING).int()

    return replace(
        full,
        query=pad(full.query),
        key=pad(full.key),
        query_lengths=full.query_lengths.int(),
        key_lengths=full.key_lengths.int(),
        pairs=batch.pairs,
    )


def targets(pairs: Sequence[Pair], size: int, length: int) -> Targets:
    """Of a padded batch; the copies that fill it up have weight 0."""
    partner = np.full((2, size, length), -1, dtype=np.int32)
    weight, aligned = np.zeros((2, 2, size, length), dtype=np.float32)
    share = np.zeros(size, dtype=np.float32)
    for index, pair in enumerate(pairs):
        n, m = len(pair.query), len(pair.key)
        i, j = pair.target.T
        share[index] = 1.0 / (n + m if len(i) else UNRELATED_RESIDUES) / len(pairs)
        partner[0, index, i], partner[1, index, j] = j, i
        weight[0, index, i] = 2.0 / (n + m)
        aligned[:, index][0, i] = aligned[:, index][1, j] = 0.5 / max(len(i), 1)
        for side, lone in enumerate(unmatched(n, m, pair.target)):
            partner[side, index, lone] = length
            weight[side, index, lone] = 1.0 / (n + m)
    weight /= len(pairs)
    aligned /= len(pairs)
    tensors = [torch.from_numpy(side) for both in (partner, weight, aligned) for side in both]
    tensors.append(torch.from_numpy(share))
    return Targets(*tensors)


def plan_loss(plan: Tensor, known: Targets) -> Tensor:
    """`objective.plan_loss` of a plan [N, L+1, S+1]."""
    length, size = plan.shape[1] - 1, plan.shape[2] - 1
    log_plan = plan.clamp_min(LOG_FLOOR).log()
    columns = torch.arange(size + 1, device=plan.device, dtype=known.row_partner.dtype)
    chosen = (known.row_partner[..., None] == columns).to(plan.dtype)
    of_rows = (log_plan[:, :length] * chosen).sum(2) * known.row_weight
    of_columns = log_plan[:, length, :size] * known.col_weight
    return -(of_rows.sum() + of_columns.sum())


def barycentre_loss(plan: Tensor, known: Targets) -> Tensor:
    """`objective.barycentre_loss` of a plan [N, L+1, S+1]."""
    real = plan[:, :-1, :-1]
    of_rows = (centres(real) - known.row_partner).abs() * known.row_aligned
    of_columns = (centres(real.transpose(1, 2)) - known.col_partner).abs() * known.col_aligned
    return of_rows.sum() + of_columns.sum()


def runs_loss(scores: Tensor, log_odds: Tensor, known: Targets) -> Tensor:
    """`objective.runs_loss` of scores [N, L, S]."""
    columns = torch.arange(scores.shape[2], device=scores.device, dtype=known.row_partner.dtype)
    chosen = (known.row_partner[..., None] == columns).to(scores.dtype)
    of_pairs = F.softplus(log_odds) - (scores * chosen).sum((1, 2))
    return (of_pairs * known.share).sum()


def training_loss(output: Output, known: Targets, barycentre_weight: float) -> Tensor:
    """`objective.training_loss`."""
    loss = plan_loss(output.last, known) + FIRST_STAGE_WEIGHT * plan_loss(output.first, known)
    if output.scores is not None and output.log_odds is not None:
        loss = loss + RUNS_WEIGHT * runs_loss(output.scores, output.log_odds, known)
    return loss + barycentre_weight * barycentre_loss(output.last, known)
