"""How likely each pair of residues is to be aligned where gaps are runs: the posterior of a pair hidden Markov model.

A transport plan charges every unmatched residue by itself: one gap of ninety residues and ninety gaps of one cost the
same. Alignment programs charge for opening a gap. The sum over all alignments with such affine gap costs, by the
forward and backward recursions, gives every pair a probability that knows the difference, and the aligner takes it for
evidence. Durbin, Eddy, Krogh and Mitchison, Biological Sequence Analysis (1998), chapter 4.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_NEVER = -1e9
"""The logarithm of zero, but finite: differences of two of them are not NaN."""

_States = tuple[Tensor, ...]
_Step = Callable[[_States, Tensor], tuple[_States, tuple[Tensor, Tensor]]]


@torch.no_grad()
def log_posterior(
    scores: Tensor, query_lengths: Tensor, key_lengths: Tensor, opening: float, extension: float
) -> Tensor:
    """Log probability that i is aligned with j, [N, L, S]; below -1e8 on padding.

    The probability of a global alignment is in proportion to the exponential of the sum of the ``scores`` of its pairs,
    less ``opening`` for the first and ``extension`` for each further residue of a gap, at the ends too. A gap may
    follow a gap of the other sequence, in either order. No gradient.

    Args:
        scores: [N, L, S], in nats, float32 or float64. In float32 an error of 0.004 is possible at 1500 residues.
        query_lengths, key_lengths: [N], from 1 to L and S.
        opening, extension: in nats.
    """
    if scores.shape[1] > scores.shape[2]:  # a state is as long as the queries
        return log_posterior(scores.mT, key_lengths, query_lengths, opening, extension).mT
    rows, columns = _from_end(query_lengths, scores.shape[1]), _from_end(key_lengths, scores.shape[2])
    active = (rows >= 0)[:, :, None] & (columns >= 0)[:, None]
    scores = scores.masked_fill(~active, _NEVER)
    # What follows a pair is what precedes it when both sequences are read from their ends: one sweep for both.
    turned = _turned(scores, rows, columns).masked_fill(~active, _NEVER)
    n, m = (torch.cat([side, side]).long() for side in (query_lengths, key_lengths))
    weights, totals = _forward(torch.cat([scores, turned]), n, m, opening, extension)
    until, since = weights.chunk(2)
    found = until + _turned(since, rows, columns) - scores - totals.chunk(2)[0][:, None, None]
    return found.clamp(max=0.0).masked_fill(~active, _NEVER)


def _from_end(lengths: Tensor, size: int) -> Tensor:
    """n - 1 - i, [N, size]; negative on padding."""
    return lengths.long()[:, None] - 1 - torch.arange(size, device=lengths.device)


def _turned(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[N, L, S] maps read from the ends of both sequences; anything on padding."""
    rows = rows.clamp(min=0)[:, :, None].expand_as(maps)
    columns = columns.clamp(min=0)[:, None].expand_as(maps)
    return maps.gather(1, rows).gather(2, columns)


def _forward(scores: Tensor, n: Tensor, m: Tensor, opening: float, extension: float) -> tuple[Tensor, Tensor]:
    """Log weight of everything up to and including each pair, [N, L, S], and of all alignments, [N].

    One antidiagonal i + j = d at a time, both counted from 1: its entries depend on the two before it and not on each
    other. A state is a vector over i = 0..L.
    """
    length, size = scores.shape[1:]
    never = scores.new_full((len(scores), length + 1), _NEVER)
    start = torch.cat([torch.zeros_like(never[:, :1]), never[:, 1:]], dim=1)
    antidiagonals = _antidiagonals(F.pad(scores, (1, 0, 1, 0), value=_NEVER))[1:]
    weights, ends = _scan(_step(opening, extension), (start, never, never, start, never), antidiagonals)
    total = ends[n + m - 1, torch.arange(len(n), device=n.device), n]
    pairs = _from_antidiagonals(torch.cat([never[None], weights]), size + 1)[:, 1:, 1:]
    return pairs, total


@lru_cache
def _step(opening: float, extension: float) -> _Step:
    """From the states at d - 1 (last comes a pair, a query residue alone, a key residue alone, any of them; and any at
    d - 2) and the scores at d to the states at d."""

    def step(states: _States, scores: Tensor) -> tuple[_States, tuple[Tensor, Tensor]]:
        pair, query, key, last, before = states
        next_pair = scores + _down(before)
        next_query = _down(_log_add(_log_add(pair, key) - opening, query - extension))
        next_key = _log_add(_log_add(pair, query) - opening, key - extension)
        ends = _log_add(next_pair, _log_add(next_query, next_key))
        return (next_pair, next_query, next_key, ends, last), (next_pair, ends)

    return step


def _scan(step: _Step, states: _States, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Both outputs of every step, stacked."""
    if steps.device.type == "xla":  # one loop in the program, where Python's would be unrolled
        from torch_xla.experimental.scan import scan

        return scan(step, states, steps, is_fn_pure=True)[1]
    outputs = []
    for scores in steps:
        states, output = step(states, scores)
        outputs.append(output)
    first, second = zip(*outputs, strict=True)
    return torch.stack(first), torch.stack(second)


def _log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b))."""
    if a.device.type != "xla":
        return torch.logaddexp(a, b)
    # torch_xla would leave that to the host, which a scan cannot.
    return torch.maximum(a, b) + torch.log1p(torch.exp(-(a - b).abs()))


def _down(state: Tensor) -> Tensor:
    """Entry i - 1 in place of i."""
    return F.pad(state[:, :-1], (1, 0), value=_NEVER)


def _antidiagonals(maps: Tensor) -> Tensor:
    """[N, L, S] to [L + S - 1, N, L]: entry (i, j) at (i + j, i)."""
    length, size = maps.shape[1:]
    flat = F.pad(maps, (0, length), value=_NEVER).flatten(1)[:, : length * (length + size - 1)]
    return flat.unflatten(1, (length, length + size - 1)).permute(2, 0, 1).contiguous()


def _from_antidiagonals(antidiagonals: Tensor, size: int) -> Tensor:
    """The inverse of ``_antidiagonals``."""
    length = antidiagonals.shape[2]
    flat = F.pad(antidiagonals.permute(1, 2, 0).flatten(1), (0, length))
    return flat.unflatten(1, (length, length + size))[..., :size]
