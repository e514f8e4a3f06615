"""The training loss: negative log plan on every residue's target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .metrics import LOG_FLOOR, unmatched
from .model import Output
from .pairs import Pair

FIRST_STAGE_WEIGHT = 0.3
RUNS_WEIGHT = 0.5
UNRELATED_RESIDUES = 60
"""Pairs with nothing to align count as if they were so long to the pair HMM. That a score of nothing but chance is less
than none is said by the odds of the whole pair alone, so it weighs more than a residue's part."""


def plan_loss(plan: Tensor, pairs: Sequence[Pair]) -> Tensor:
    """Mean over pairs of ``metrics.reconstruction``, differentiable; ``plan`` is [N, L+1, S+1], padded.

    The plan is clamped before the logarithm: a float32 entry may be 0, whose gradient would be infinite. A clamped
    entry gets no gradient itself, but its row's and column's masses still pull through the other entries.
    """
    rows, cols, batch, weights = [], [], [], []
    last_row, last_col = plan.shape[1] - 1, plan.shape[2] - 1
    for index, pair in enumerate(pairs):
        n, m = len(pair.query), len(pair.key)
        lone_rows, lone_cols = (torch.from_numpy(lone) for lone in unmatched(n, m, pair.target))
        target = torch.from_numpy(pair.target)
        rows += [target[:, 0], lone_rows, torch.full_like(lone_cols, last_row)]
        cols += [target[:, 1], torch.full_like(lone_rows, last_col), lone_cols]
        count = len(target) + len(lone_rows) + len(lone_cols)
        batch.append(torch.full((count,), index))
        weight = torch.full((count,), 1.0 / (n + m))
        weight[: len(target)] *= 2.0
        weights.append(weight)
    picked = plan[torch.cat(batch), torch.cat(rows), torch.cat(cols)]
    return -(torch.cat(weights) * picked.clamp_min(LOG_FLOOR).log()).sum() / len(pairs)


def barycentre_loss(plan: Tensor, pairs: Sequence[Pair]) -> Tensor:
    """Mean over aligned residues of the distance between where the plan sends them and where they belong, in residues.

    Both directions count: query residues on the key sequence and key residues on the query. It weighs a stray entry by
    how far it strays, which the likelihood of the target entries does not.
    """
    real = plan[:, :-1, :-1]
    on_key, on_query = centres(real), centres(real.transpose(1, 2))
    total = plan.new_zeros(())
    for index, pair in enumerate(pairs):
        if len(pair.target) == 0:
            continue
        i, j = torch.from_numpy(pair.target).unbind(dim=1)
        total = total + 0.5 * ((on_key[index, i] - j).abs().mean() + (on_query[index, j] - i).abs().mean())
    return total / len(pairs)


def runs_loss(scores: Tensor, log_odds: Tensor, pairs: Sequence[Pair]) -> Tensor:
    """Minus the log probability of the right alignment for the pair HMM, a residue: mean over the pairs.

    Up to what its gaps and ends cost, which nothing is learned of. ``scores`` and ``log_odds`` are ``RunEvidence``'s:
    the weight of all alignments is that of none, 1, and theirs.
    """
    total = scores.new_zeros(())
    for index, pair in enumerate(pairs):
        i, j = torch.from_numpy(pair.target).unbind(dim=1)
        residues = len(pair.query) + len(pair.key) if len(pair.target) else UNRELATED_RESIDUES
        total = total + (F.softplus(log_odds[index]) - scores[index, i, j].sum()) / residues
    return total / len(pairs)


def training_loss(output: Output, pairs: Sequence[Pair], barycentre_weight: float) -> Tensor:
    """The last plan's losses, plus a fraction of the first's: deep supervision, so that both plans mean alignment; and
    the pair HMM's."""
    loss = plan_loss(output.last, pairs) + FIRST_STAGE_WEIGHT * plan_loss(output.first, pairs)
    if output.scores is not None and output.log_odds is not None:
        loss = loss + RUNS_WEIGHT * runs_loss(output.scores, output.log_odds, pairs)
    return loss + barycentre_weight * barycentre_loss(output.last, pairs)


def centres(real: Tensor) -> Tensor:
    """Where each row of a plan without its dustbin lands, sum_j P_ij j / sum_j P_ij: [N, L, S] to [N, L]."""
    positions = torch.arange(real.shape[2], dtype=real.dtype, device=real.device)
    return (real @ positions) / real.sum(dim=2).clamp_min(1e-6)
