"""Matches: the partners of every token in the plan, without the plan."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from torch_sinkhorn_attn._ops import ops as lib
from torch_sinkhorn_attn.boundary import ops
from torch_sinkhorn_attn.compat.tracing import one_node
from torch_sinkhorn_attn.distributed import context
from torch_sinkhorn_attn.engines import REFERENCE, choose
from torch_sinkhorn_attn.functional import refuse_dropout, refuse_unknown
from torch_sinkhorn_attn.method import reference
from torch_sinkhorn_attn.options import count
from torch_sinkhorn_attn.problem.arguments import Keywords, Prepared, prepare
from torch_sinkhorn_attn.problem.problem import Inputs, Partners, full_precision
from torch_sinkhorn_attn.problem.segments import mass_of


class Matches(NamedTuple):
    """Partners of the queries (rows) and keys (columns) of a plan P. Nothing here has a gradient.

    Attributes:
        row_index: `(..., H, L, k)` int64, the keys that get most of each query, most first; ties to the lowest index.
            -1 where fewer than k keys get any, as where the token is inactive.
        row_plan: `(..., H, L, k)`, their entries of the plan, 0 where there is none; float32, or float64 for float64.
        col_index, col_plan: `(..., H, S, k)`, likewise the queries that give most to each key.
        row_match: `(..., H, L)` int64, the mutual match of each query: the key it gives most to, if that gets most from
            this query; else -1. `matches0` of SuperGlue and LightGlue at threshold 0.
        col_match: `(..., H, S)` int64, likewise of each key, `matches1`.
        probability: `(..., H, L)`, P_ij / a_i of the mutual match j of query i, 0 without one: the share of the query's
            mass. With a dustbin masses are 1 by default, and this is SuperGlue's `matching_scores0`.
        row_dustbin: `(..., H, L)`, what each query leaves to its own dustbin, to be compared with `row_plan`; None
            without a dustbin.
        col_dustbin: `(..., H, S)`, what each key gets from it.

    Where the plan is NaN a NaN comes first, and so do `row_plan` and `probability` show it.
    """

    row_index: Tensor
    row_plan: Tensor
    col_index: Tensor
    col_plan: Tensor
    row_match: Tensor
    col_match: Tensor
    probability: Tensor
    row_dustbin: Tensor | None
    col_dustbin: Tensor | None

    def mutual(self, threshold: float = 0.0) -> tuple[Tensor, Tensor]:
        """Mutual matches as pairs: those whose probability lies above `threshold` (SuperGlue's default is 0.2,
        LightGlue's 0.1; 0.5 beats the dustbin), or is NaN.

        Returns:
            `(M, D)` int64, D = the number of dimensions of (..., H, L) and one: batch indices and head, then query and
            key; and their probabilities `(M)`. How many there are is a matter of data.
        """
        kept = (self.row_match >= 0) & ~(self.probability <= threshold)
        where = kept.nonzero()
        return torch.cat([where, self.row_match[kept][:, None]], -1), self.probability[kept]


@one_node
def sinkhorn_matches(
    query: Tensor,
    key: Tensor | None = None,
    attn_mask: Tensor | None = None,
    *,
    k: int = 1,
    sequence_group: Any = None,
    **options: Unpack[Keywords],
) -> Matches:
    """The k best partners of every query and of every key in the transport plan, and the mutual matches among them.
    `sinkhorn_matches(scores)` are those of a score matrix.

    They are those of `sinkhorn_plan` with the same options, found while the plan is read once: O(L + S) memory. They
    are indices, and the masses beside them are detached; for a loss use `sinkhorn_plan`.

    Args:
        query, key, attn_mask, options: as `sinkhorn_plan`; without a key `query` holds the scores.
        k: how many partners, 1 or more; more than there are leaves -1.
        sequence_group: as in `sinkhorn_attention`: what is found is of the local queries and keys, in indices of the
            whole sequence.

    Returns:
        `Matches`.

    Raises:
        TypeError, ValueError: as `sinkhorn_plan`, or for a `k` that is no positive integer.

    >>> import torch
    >>> from torch_sinkhorn_attn import Dustbin
    >>> points = torch.eye(4).mul(4)[None]  # one head
    >>> matches = sinkhorn_matches(points, points[:, [2, 0, 1]], scale=1.0, dustbin=Dustbin(8.0, 8.0))
    >>> matches.row_match  # the last query has no partner
    tensor([[ 1,  2,  0, -1]])
    >>> pairs, probability = matches.mutual(threshold=0.2)
    >>> pairs[:, -2:].tolist()
    [[0, 1], [1, 2], [2, 0]]
    """
    refuse_unknown("sinkhorn_matches", options)
    refuse_dropout("sinkhorn_matches", options, "the plan has no dropout")
    k = count("k", k)
    if k < 1:
        raise ValueError(f"k={k} must be 1 or more.")
    group = context.group_of(sequence_group, query)
    with torch.no_grad():
        if group is not None:
            from torch_sinkhorn_attn.distributed import calls

            return calls.sharded_matches(group, query, key, attn_mask, options, k)
        prepared = prepare(query, key, None, attn_mask, **options)
        inputs, problem = Inputs(*(None if x is None else x.detach() for x in prepared.inputs)), prepared.problem  # type: ignore[arg-type]
        engine = choose(prepared.engine, inputs, problem)
        if engine == REFERENCE:
            with full_precision(inputs.query.device):
                found = reference.matches(inputs, problem, k)
        else:
            found = Partners(*lib.matches(*ops.with_residuals(ops.flatten(inputs, problem, engine), k)))
        return of_partners(prepared, found, *mutual(found.row_index[..., 0], found.col_index[..., 0]))


def of_partners(prepared: Prepared, found: Partners, row_match: Tensor, col_match: Tensor) -> Matches:
    """In the caller's unit of mass and shapes; the masses of `prepared` are those of the same rows."""
    problem, scale = prepared.problem, prepared.scale
    best = found.row_plan[..., 0]
    share = best / mass_of(problem.marginals.log_row_mass).to(best.dtype)
    probability = torch.where((row_match >= 0) | best.isnan(), share, 0.0)
    masses = [found.row_plan, found.col_plan, found.row_dustbin, found.col_dustbin]
    if scale is not None:
        probability = scale.of_output(probability)
        masses = [x if x.numel() == 0 else scale.of_plan(x) for x in masses]
    bins = masses[2:] if problem.has_dustbin else (None, None)
    results = (found.row_index, masses[0], found.col_index, masses[1], row_match, col_match, probability, *bins)
    return Matches(*(None if x is None else prepared.unflatten(x) for x in results))  # type: ignore[arg-type]


def mutual(key_of: Tensor, query_of: Tensor) -> tuple[Tensor, Tensor]:
    """`[N, H, L]` and `[N, H, S]`: partners that are each other's, -1 elsewhere."""
    return _returned(key_of, query_of), _returned(query_of, key_of)


def _returned(partner: Tensor, back: Tensor) -> Tensor:
    if back.shape[-1] == 0:
        return partner
    own = torch.arange(partner.shape[-1], device=partner.device)
    return torch.where((partner >= 0) & (back.gather(-1, partner.clamp(min=0)) == own), partner, -1)
