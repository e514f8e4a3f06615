"""How a call's iterations converge: the residual after each, and how many a tolerance left."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from torch_sinkhorn_attn.functional import refuse_unknown
from torch_sinkhorn_attn.problem.arguments import Keywords, Prepared, prepare
from torch_sinkhorn_attn.problem.problem import without_autocast
from torch_sinkhorn_attn.thermometer.history import History, history
from torch_sinkhorn_attn.thermometer.passes import passes_of


def residual_history(
    query: Tensor, key: Tensor | None = None, attn_mask: Tensor | None = None, **options: Unpack[Keywords]
) -> Tensor:
    """How far from balance the plan is after each of the T + R iterations of `sinkhorn_attention` with these options.

    The largest |log(column sum / b_j)| over the columns of each problem, the dustbin's included: to first order the
    largest relative column error. It is what the next plain column half-step moves the potentials by, which is what
    `tolerance` is compared with; so where a side is relaxed, and its marginal only penalised, it still falls to 0. Rows
    come last in an iteration and are met. The iterates are those of the solver: over-relaxed or accelerated where the
    T iterations are, and standing still from where `tolerance` ended them; the last R are plain.

    A plain base costs about one forward pass. One that is over-relaxed or accelerated costs 2 T passes over the scores,
    each with the work of the first iteration of a forward pass. XLA's tensors are solved on the CPU.

    Args:
        query, key, attn_mask, options: as `sinkhorn_attention`; `dropout_p` and `gradient` change nothing.

    Returns:
        `(..., H, T + R)`, or `(..., H, G, T + R)` when packed, G = min(L, S), 0 for segments that no token has; float32
        (float64 for float64), detached.

    Raises:
        TypeError, ValueError: as `sinkhorn_attention`.

    >>> import torch
    >>> q, k = (torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    >>> history = residual_history(q, k, base_iters=8, tail_iters=2)
    >>> history.shape, bool((history[..., 1:] < history[..., :-1]).all())
    (torch.Size([1, 10]), True)
    """
    prepared, found = _history("residual_history", query, key, attn_mask, options)
    return _unflatten(prepared, found.movement.movedim(0, -1))


def iterations_used(
    query: Tensor, key: Tensor | None = None, attn_mask: Tensor | None = None, **options: Unpack[Keywords]
) -> Tensor:
    """How many iterations `sinkhorn_attention` takes for each problem: T + R, or fewer where `tolerance` ends the T.

    Args, cost: as `residual_history`.

    Returns:
        int64 `(..., H)`, or `(..., H, G)` when packed.

    Raises:
        TypeError, ValueError: as `sinkhorn_attention`.

    >>> import torch
    >>> q, k = (torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    >>> iterations_used(q, k, base_iters=50, tolerance=1e-2)
    tensor([5])
    """
    prepared, found = _history("iterations_used", query, key, attn_mask, options)
    return _unflatten(prepared, found.used)


def _history(
    name: str, query: Tensor, key: Tensor | None, mask: Tensor | None, options: Keywords
) -> tuple[Prepared, History]:
    refuse_unknown(name, options)
    keywords: Keywords = {**options, "dropout_p": 0.0}
    with torch.no_grad(), without_autocast(query):
        prepared = prepare(query, key, None, mask, **keywords)
        return prepared, history(passes_of(prepared))


def _unflatten(prepared: Prepared, x: Tensor) -> Tensor:
    """`[N, H, G, ...]` in the user's batch, G for packed problems only."""
    return prepared.unflatten(x if prepared.problem.support.row_segment is not None else x[:, :, 0])
