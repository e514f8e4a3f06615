"""The attentions that are compared: each turns one problem into a plan, [N, L+1, S+1] with the dustbin last.

They share everything but the normalisation: scores, padding, window, and a dustbin score for every residue.

- sinkhorn: the balanced plan with a dustbin.
- softmax: a softmax over keys and dustbin for every query, as in any cross-attention; keys are not asked. Queries
  choose independently: that none chose key j has probability prod_i (1 - P_ij), its entry in the dustbin's row.
- dual-softmax: the geometric mean of that softmax and the one over queries and dustbin for every key; its negative
  logarithm is the mean of both directions' cross-entropies (LoFTR multiplies: arXiv:2104.00680, equation 2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_sinkhorn_attn import Dustbin, sinkhorn_plan

_SURE = 1e-6
"""A probability is kept this far from 1 where the logarithm of its complement is taken."""


@dataclass(frozen=True)
class AttentionProblem:
    """The arguments of one attention, so that training, certificates and pictures solve the same problem.

    ``query`` [N, 1, L, E], ``key`` [N, 1, S, E], ``attn_mask`` [N, 1, L, S] or None, ``options`` as in
    ``sinkhorn_plan``: lengths, and a dustbin with scores [N, 1, L] and [N, 1, S], among them.
    """

    query: Tensor
    key: Tensor
    attn_mask: Tensor | None
    options: dict[str, Any]
    attention: str = "sinkhorn"

    def plan(self) -> Tensor:
        """[N, L+1, S+1], the dustbin last."""
        return ATTENTIONS[self.attention](self)


def _sinkhorn(problem: AttentionProblem) -> Tensor:
    return sinkhorn_plan(problem.query, problem.key, problem.attn_mask, **problem.options)[:, 0]


def _softmax(problem: AttentionProblem) -> Tensor:
    scores, to_bin, _ = _scores(problem)
    plan = torch.cat([scores, to_bin[..., None]], dim=2).softmax(dim=2) * _active(problem)[0]
    untaken = torch.log1p(-plan[..., :-1].clamp(max=1 - _SURE)).sum(dim=1).exp()
    return _with_dustbin_row(plan, untaken * _active(problem)[1][:, 0])


def _dual_softmax(problem: AttentionProblem) -> Tensor:
    scores, to_bin, from_bin = _scores(problem)
    rows = torch.cat([scores, to_bin[..., None]], dim=2).log_softmax(dim=2)
    columns = torch.cat([scores, from_bin[:, None]], dim=1).log_softmax(dim=1)
    query_active, key_active = _active(problem)
    real = ((rows[..., :-1] + columns[:, :-1]) / 2).exp() * query_active * key_active
    plan = torch.cat([real, rows[..., -1:].exp() * query_active], dim=2)
    return _with_dustbin_row(plan, (columns[:, -1:].exp() * key_active)[:, 0])


ATTENTIONS: dict[str, Callable[[AttentionProblem], Tensor]] = {
    "sinkhorn": _sinkhorn,
    "softmax": _softmax,
    "dual-softmax": _dual_softmax,
}


def _scores(problem: AttentionProblem) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [N, L, S], -inf off the support, and the dustbin scores [N, L], [N, S]."""
    scores = (problem.query @ problem.key.transpose(2, 3))[:, 0]
    if problem.attn_mask is not None:
        scores = scores + problem.attn_mask[:, 0]
    dustbin: Dustbin = problem.options["dustbin"]
    to_bin, from_bin = torch.as_tensor(dustbin.row_score), torch.as_tensor(dustbin.col_score)
    return scores.masked_fill(~_support(problem), -torch.inf), to_bin[:, 0], from_bin[:, 0]


def _active(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """1 on residues and 0 on padding, [N, L, 1] and [N, 1, S]."""
    sides = (problem.query, problem.options["query_lengths"]), (problem.key, problem.options["key_lengths"])
    query, key = (
        (torch.arange(tokens.shape[2], device=tokens.device) < lengths[:, None]).to(tokens.dtype)
        for tokens, lengths in sides
    )
    return query[:, :, None], key[:, None]


def _support(problem: AttentionProblem) -> Tensor:
    """Whether i and j are residues and j is in the window of i, as ``sinkhorn_plan`` has it, [N, L, S]."""
    query, key = _active(problem)
    support = (query * key).bool()
    window: tuple[int, int] | None = problem.options.get("window")
    if window is None:
        return support
    i = torch.arange(query.shape[1], device=query.device)[:, None]
    j = torch.arange(key.shape[2], device=query.device)
    n, m = (problem.options[f"{side}_lengths"].long()[:, None, None] for side in ("query", "key"))
    distance = 2 * n * j - (2 * i + 1) * m + n  # 2n (j - c_i), an integer
    return support & (distance >= -2 * n * window[0]) & (distance <= 2 * n * window[1])


def _with_dustbin_row(plan: Tensor, untaken: Tensor) -> Tensor:
    """[N, L, S+1] and [N, S] to [N, L+1, S+1]; the corner is 0."""
    return torch.cat([plan, F.pad(untaken, (0, 1))[:, None]], dim=1)
