"""Where a band should lie: centres for `window_centers`, from a transport plan between pooled tokens.

Blocks of tokens are added up, a dense plan between them is solved, and the monotone way through it that gathers most
mass is the centre line:

    plan of blocks       the way            centres of the queries
    9 1 . . .            x . . . .          on the line through the blocks' centres
    1 2 1 1 1            x . . . .
    . . 1 8 1            . x x x .          (keys 1 and 2 have no query)
    . . . 1 9            . . . . x
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_sinkhorn_attn.dustbin import Dustbin
from torch_sinkhorn_attn.functional import sinkhorn_plan
from torch_sinkhorn_attn.options import Options, Relaxation, count
from torch_sinkhorn_attn.problem.argument_checks import integers, tokens
from torch_sinkhorn_attn.problem.data_checks import check_lengths
from torch_sinkhorn_attn.problem.looking import has_data

BLOCKS = 512  # of a side, where nobody says how many tokens are pooled
_LEAST = 1e-300  # stands for no mass at all


@torch.no_grad()
def scout_centers(
    query: Tensor,
    key: Tensor,
    *,
    pool: int | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = Options.scale,
    epsilon: float = Options.epsilon,
    relaxation: Relaxation = Options.relaxation,
    dustbin: Dustbin | None = None,
    base_iters: int = 50,
    enable_gqa: bool = Options.enable_gqa,
) -> Tensor:
    """Centres for `sinkhorn_attention(..., window=, window_centers=)`, of sequences that the diagonal does not align.

    Each block of `pool` tokens is added up and divided by the square root of their number, so that scores between
    blocks spread as those between tokens do. The plan between blocks, of all heads together, is searched for the
    monotone way that gathers most mass (by dynamic programming), from the first blocks to the last. Centres lie on the
    line through the blocks' centres, so they are right to about a block: let the window be `pool` or more to each side.

    It looks at data, so it does not run inside a recorded program (torch.compile, torch.export); its result, a tensor
    like any, may be given to one. Memory and time are O(L S / pool^2).

    Args:
        query: `(..., H, L, E)`.
        key: `(..., Hk, S, E)`.
        pool: tokens of a block, 1 or more. Default: as few as give at most 512 blocks a side.
        query_lengths, key_lengths: integer tensors `(...)`: only so many leading tokens are active.
        scale, epsilon, relaxation, enable_gqa: as in `sinkhorn_attention`.
        dustbin: as there, for sequences with tokens that have no partner; scores are numbers, or the same for all
            tokens (`(H, 1)`), and compared with scores between blocks.
        base_iters: iterations between the blocks. Default 50.

    Returns:
        `(..., L)`, float32: where each query's partner lies on the axis of the keys, not falling along L. Centres of
        inactive queries repeat the last active one's.

    Raises:
        TypeError, ValueError: as `sinkhorn_attention`, and for data that cannot be looked at.

    >>> import torch
    >>> key = torch.randn(1, 60, 16, generator=torch.Generator().manual_seed(0)) * 4
    >>> query = torch.cat([key[:, :10], key[:, 40:]], 1)  # 30 keys have no query
    >>> centers = scout_centers(query, key, pool=2)
    >>> centers[..., [5, 25]].round()  # their partners: keys 5 and 55
    tensor([ 5., 55.])
    """
    query, key, _ = tokens(query, key, None, enable_gqa)
    batch, length, size = query.shape[:-3], query.shape[-2], key.shape[-2]
    if not has_data(query, key):
        raise ValueError(
            "scout_centers looks at data, so it cannot be part of a recorded program: call it before, and pass its "
            "result on as window_centers."
        )
    if pool is None:
        pool = max(1, -(-max(length, size) // BLOCKS))
    elif (pool := count("pool", pool)) == 0:
        raise ValueError("pool=0 must be 1 or more, the tokens of a block.")
    lengths = []
    for name, given, limit in (("query_lengths", query_lengths, length), ("key_lengths", key_lengths, size)):
        given = integers(name, given, batch, query.device)
        check_lengths(given, name, limit)
        lengths.append(torch.full(batch, limit, device=query.device) if given is None else given.to(torch.int64))
    if 0 in (query.shape[:-3].numel(), length, size):
        return torch.zeros(*batch, length, device=query.device)
    pooled, counts = zip(*(_pooled(x, n, pool) for x, n in zip((query, key), lengths)), strict=True)
    rows, cols = (x / pool for x in counts)
    options: dict[str, Any] = {"row_mass": rows[..., None, :], "col_mass": cols[..., None, :]}
    if dustbin is None:
        unit = rows.sum(-1, keepdim=True) / cols.sum(-1, keepdim=True)
        options["col_mass"] = options["col_mass"] * torch.where(unit > 0, unit, 1)[..., None]
    plan = sinkhorn_plan(
        *pooled, **options, scale=scale, epsilon=epsilon, relaxation=relaxation, dustbin=dustbin,
        base_iters=base_iters, tail_iters=0, enable_gqa=enable_gqa,
        query_lengths=-(-lengths[0] // pool), key_lengths=-(-lengths[1] // pool),
    )  # fmt: skip
    mass = plan[..., : rows.shape[-1], : cols.shape[-1]].sum(-3).reshape(-1, rows.shape[-1], cols.shape[-1])
    mass, ends = mass.double().cpu(), [x.flatten().cpu() for x in lengths]
    first, last = monotone_way(mass, *(-(-x // pool) for x in ends))
    found = _centers(mass, first, last, ends[0], ends[1], length, pool)
    return found.reshape(*batch, length).to(query.device, torch.float32)


def _pooled(x: Tensor, lengths: Tensor, pool: int) -> tuple[Tensor, Tensor]:
    """`[..., H, blocks, E]`: blocks of active tokens added up, over the root of how many, `[..., blocks]`."""
    tokens = x.shape[-2]
    blocks = -(-tokens // pool)
    active = torch.arange(tokens, device=x.device) < lengths[..., None]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    held = torch.where(active[..., None, :, None], x.to(wide), 0)
    held = torch.nn.functional.pad(held, (0, 0, 0, blocks * pool - tokens)).unflatten(-2, (blocks, pool)).sum(-2)
    count = (lengths[..., None] - pool * torch.arange(blocks, device=x.device)).clamp(0, pool).to(wide)
    return held / count.clamp(min=1).sqrt()[..., None, :, None], count


def monotone_way(mass: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """The way from the first entry of `mass [N, n, m]` to entry (rows - 1, cols - 1), `[N]` each, by steps to the next
    row, the next column or both, that gathers most: the first and the last column of each row, `[N, n]`; those of rows
    beyond the last are its last column.

    >>> first, last = monotone_way(torch.eye(3)[None], torch.tensor([3]), torch.tensor([3]))
    >>> first, last
    (tensor([[0, 1, 2]]), tensor([[0, 1, 2]]))
    """
    num, n, m = mass.shape
    none = torch.full((num, 1), -torch.inf, dtype=mass.dtype)
    best = torch.cat([torch.zeros_like(none), none.expand(-1, m - 1)], -1)  # of what comes before a row's first column
    enters, above = [], []
    for row in mass.unbind(1):
        gathered = row.cumsum(-1)
        highest, column = (best - gathered + row).cummax(-1)
        total = highest + gathered
        beside = torch.cat([none, total[:, :-1]], -1)
        enters.append(column)
        above.append(beside < total)  # the next row begins where this one ends, or one column on
        best = torch.maximum(beside, total)
    line = torch.arange(num)
    last = torch.empty(num, n, dtype=torch.int64)
    first = torch.empty_like(last)
    at = (cols - 1).clamp(min=0)
    for i in reversed(range(n)):
        last[:, i], first[:, i] = at, torch.where(i < rows, enters[i][line, at], at)
        if i > 0:
            same = above[i - 1][line, first[:, i]]
            at = torch.where(i < rows, torch.where(same, first[:, i], first[:, i] - 1), at).clamp(min=0)
    return first, last


def _centers(mass: Tensor, first: Tensor, last: Tensor, rows: Tensor, cols: Tensor, length: int, pool: int) -> Tensor:
    """Centres of `length` queries, on the line through the blocks' own, which lie where the way has most mass; before
    the first block's middle and after the last one's it goes on a key for each query."""
    column = torch.arange(mass.shape[-1])
    on = (column >= first[..., None]) & (column <= last[..., None])
    most = torch.where(on, mass, -1).argmax(-1, keepdim=True)  # a block astride an insertion goes to one side of it
    on &= (column - most).abs() <= 1
    weight = torch.where(on, mass + 1e-6 * mass.amax((1, 2), keepdim=True).clamp(min=_LEAST), 0)
    found = (weight * _middles(cols, mass.shape[-1], pool)[:, None]).sum(-1) / weight.sum(-1)
    place = _middles(rows, mass.shape[1], pool)
    end, limit = ((x[:, None] - 1).clamp(min=0).to(mass.dtype) for x in (rows, cols))
    before, after = (found - place)[:, :1], found[:, -1:] + end - place[:, -1:]
    place, found = torch.cat([torch.zeros_like(end), place, end], -1), torch.cat([before, found, after], -1)
    query = torch.minimum(torch.arange(length, dtype=mass.dtype).expand(len(rows), -1), end)
    right = torch.searchsorted(place, query.contiguous(), right=True).clamp(max=place.shape[-1] - 1)
    (x0, y0), (x1, y1) = ((place.gather(-1, at), found.gather(-1, at)) for at in (right - 1, right))
    line = y0 + torch.where(x1 > x0, (y1 - y0) / (x1 - x0), 0) * (query - x0)
    return torch.minimum(line.clamp(min=0), limit).cummax(-1).values


def _middles(lengths: Tensor, blocks: int, pool: int) -> Tensor:
    """Where the active tokens of each block have their middle, `[N, blocks]`; beyond the last, that of the last."""
    start = (pool * torch.arange(blocks, dtype=torch.float64)).expand(len(lengths), -1)
    end = torch.minimum(start + pool, lengths[:, None].double())
    return torch.where(start < end, (start + end - 1) / 2, 0).cummax(-1).values
