"""How likely each pair of residues is to be aligned where gaps are runs: the posterior of a pair hidden Markov model.

A transport plan charges every unmatched residue by itself: one gap of ninety residues and ninety gaps of one cost the
same. Alignment programs charge for opening a gap. The sum over all alignments with such affine gap costs, by the
forward and backward recursions, gives every pair a probability that knows the difference, and the aligner takes it for
evidence. Durbin, Eddy, Krogh and Mitchison, Biological Sequence Analysis (1998), chapter 4.

Proteins often share only a part. So each of the two ends of an alignment is of one of three kinds, ``ENDS``:

    global     both sequences begin here: what one has more is charged as a gap
    overlap    one sequence begins here, the other has come from further away, free of charge
    local      both have come from further away, free of charge

Both ends global is Needleman and Wunsch's alignment, both overlap is semi-global, both local is Smith and Waterman's.
Which kind an end is of is a hidden state with a prior, and its posterior is part of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import MOST, Gap, forward_weights, turned_maps

ENDS = ("global", "overlap", "local")

_NEVER = -1e9
"""The logarithm of zero, but finite: differences of two of them are not NaN."""

_TRUST = 1.5
"""Nats, see ``mean_of``. At 2, mass on a second half that is like the first moves barycentres (ArsP_1, a permease)."""

_States = tuple[Tensor, ...]
_Step = Callable[[_States, Tensor], tuple[_States, tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Costs:
    """What an alignment weighs: the exponential of the sum of its pairs' scores less these, in nats.

    Attributes:
        opening, extension: of a short gap's first and of each further residue.
        long_opening, long_extension: the same of a long gap. Every gap is of either kind, so what it weighs is the sum
            of both; by default there are no long ones.
        pair: of every pair. Scores are log odds against chance; a model that can also end, or open a gap, pairs on
            with a probability below 1.
        ends: prior probabilities of an end's kinds, in the order of ``ENDS``.
        stop: the probability that an alignment with local ends is over after a pair.

    An alignment with two local ends begins at any of n m pairs, and one with two that overlap at any of n + m - 1: the
    weight is divided by their number, half of it (in logarithms) at either end; so is ``stop`` shared.
    """

    opening: float
    extension: float
    pair: float = 0.0
    ends: tuple[float, float, float] = (1.0, 0.0, 0.0)
    stop: float = 0.01
    long_opening: float = -_NEVER
    long_extension: float = 0.0

    @property
    def gaps(self) -> tuple[Gap, Gap]:
        """Short ones, and long ones."""
        return (self.opening, self.extension), (self.long_opening, self.long_extension)

    def __post_init__(self) -> None:
        if min(self.ends) < 0 or not math.isclose(sum(self.ends), 1.0, abs_tol=1e-6):
            raise ValueError(f"ends must be three probabilities of {', '.join(ENDS)} that add up to 1, got {self.ends}")
        if not 0 < self.stop <= 1:
            raise ValueError(f"stop must be a probability above 0, got {self.stop}")


@dataclass(frozen=True)
class Posterior:
    """What the sum over all alignments says.

    Attributes:
        log_pairs: log probability that i is aligned with j, [N, L, S]; below -1e8 on padding.
        log_odds: of the two sequences having an alignment against having none, [N], in nats: the logarithm of all
            alignments' weight, priors and numbers of placements included, where nothing aligned weighs 1.
        ends: probability of the kinds of the alignment's beginning and end, [N, 2, 3].
        query_flank, key_flank: probability that a residue lies beyond an end that is free, [N, L] and [N, S].

    All but ``log_odds`` are given that there is an alignment.
    """

    log_pairs: Tensor
    log_odds: Tensor
    ends: Tensor
    query_flank: Tensor
    key_flank: Tensor

    @cached_property
    def paired(self) -> tuple[Tensor, Tensor]:
        """Probability that a residue has a partner, [N, L] and [N, S]."""
        p = self.log_pairs.exp()
        return p.sum(2), p.sum(1)

    def transposed(self) -> Posterior:
        """With the sequences exchanged."""
        return Posterior(self.log_pairs.mT, self.log_odds, self.ends, self.key_flank, self.query_flank)


def of_chance(scores: Tensor, query_lengths: Tensor, key_lengths: Tensor) -> Tensor:
    """The logarithm of what a pair of residues weighs on average, whichever they are, [N]: log mean_ij exp(s_ij).

    Scores [N, L, S] are log odds against chance, so it is about 0; less it they are just that for the two sequences'
    own residues: what is rich in alanine finds alanines anywhere.
    """
    active = _active(_from_end(query_lengths, scores.shape[1]), _from_end(key_lengths, scores.shape[2]))
    total = scores.masked_fill(~active, _NEVER).flatten(1).logsumexp(1)
    return total - (query_lengths.to(scores.dtype) * key_lengths).log()


def mean_of(found: Sequence[Posterior]) -> Posterior:
    """What several pair HMMs say of the same sequences together; ``log_odds`` are the first's.

    All weigh the same, but one to which an alignment is less likely than to the first weighs a factor e less for every
    ``_TRUST`` nats: what it says is given that there is an alignment, and may be any.
    """
    less = torch.stack([one.log_odds - found[0].log_odds for one in found]).clamp(max=0.0)
    log_weights = (less / _TRUST).log_softmax(0)

    def mean(values: Callable[[Posterior], Tensor]) -> Tensor:
        said = torch.stack([values(one) for one in found])
        return (log_weights.exp()[(...,) + (None,) * (said.dim() - 2)] * said).sum(0)

    log_pairs = None
    for weight, one in zip(log_weights, found, strict=True):
        more = one.log_pairs + weight[:, None, None]
        log_pairs = more if log_pairs is None else _log_add(log_pairs, more)
    assert log_pairs is not None
    return Posterior(
        log_pairs=log_pairs.clamp_(min=_NEVER, max=0.0),
        log_odds=found[0].log_odds,
        ends=mean(lambda one: one.ends),
        query_flank=mean(lambda one: one.query_flank),
        key_flank=mean(lambda one: one.key_flank),
    )


def log_posterior(
    scores: Tensor, query_lengths: Tensor, key_lengths: Tensor, opening: float, extension: float
) -> Tensor:
    """``Posterior.log_pairs`` of global alignments."""
    return posterior(scores, query_lengths, key_lengths, Costs(opening, extension)).log_pairs


@torch.no_grad()
def posterior(scores: Tensor, query_lengths: Tensor, key_lengths: Tensor, costs: Costs) -> Posterior:
    """The sum over all alignments, exactly. No gradient.

    A gap may follow a gap of the other sequence, in either order. Beyond a free end there is no gap: such an
    alignment begins or ends with a pair. One pair of residues or more makes an alignment, unless both ends are global.

    Args:
        scores: [N, L, S], in nats, float32 or float64. In float32 an error of 0.004 is possible at 1500 residues.
        query_lengths, key_lengths: [N], from 1 to L and S.
    """
    if scores.shape[1] > scores.shape[2]:  # a state is as long as the queries
        return posterior(scores.mT, key_lengths, query_lengths, costs).transposed()
    rows, columns = _from_end(query_lengths, scores.shape[1]), _from_end(key_lengths, scores.shape[2])
    active = _active(rows, columns)
    scores = (scores - costs.pair).masked_fill(~active, _NEVER)
    # What follows a pair is what precedes it when both sequences are read from their ends: one sweep for both.
    turned = _turned(scores, rows, columns).masked_fill(~active, _NEVER)
    n, m = (torch.cat([side, side]).long() for side in (query_lengths, key_lengths))
    kinds = _end_weights(costs, n, m, scores)
    weights, global_ends = _forward(torch.cat([scores, turned]), n, m, kinds, costs)
    until, since = weights.chunk(2)
    by_kind, total, of_rows, of_columns = _ends(weights, n, m, kinds, global_ends)
    # Where the turned sweep ends, the alignment begins.
    first, last = (_reversed(of_rows[len(scores) :], rows), of_rows[: len(scores)])
    first_key, last_key = (_reversed(of_columns[len(scores) :], columns), of_columns[: len(scores)])
    found = _turned(since, rows, columns).add_(until).sub_(scores).sub_(total[:, None, None])
    return Posterior(
        log_pairs=found.clamp_(max=0.0).masked_fill_(~active, _NEVER),
        log_odds=total,
        ends=torch.stack(by_kind.softmax(1).chunk(2)[::-1], dim=1),
        query_flank=_outside(first, last) * (rows >= 0),
        key_flank=_outside(first_key, last_key) * (columns >= 0),
    )


def _ends(
    weights: Tensor, n: Tensor, m: Tensor, kinds: tuple[Tensor, Tensor, Tensor], global_ends: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of what ``_forward`` found, in either direction: the log weight of an end of each kind, [2N, 3]; of all of them
    together, [N]; and the probability that a free end is at each row, [2N, L], and at each column, [2N, S]."""
    last_row = weights.gather(1, (n - 1)[:, None, None].expand(-1, 1, weights.shape[2]))[:, 0]
    last_column = weights.gather(2, (m - 1)[:, None, None].expand(-1, weights.shape[1], 1))[:, :, 0]
    corner = torch.arange(weights.shape[1], device=weights.device) == (n - 1)[:, None]
    above_corner = last_column.masked_fill(corner, _NEVER)
    overlap = torch.cat([last_row, above_corner], dim=1).logsumexp(1) + kinds[1]
    most = weights.flatten(1).amax(1)
    share = (weights - most[:, None, None]).exp_()
    rows, columns = share.sum(2), share.sum(1)
    local = rows.sum(1).log() + most + kinds[2]
    by_kind = torch.stack([global_ends + kinds[0], overlap, local], dim=1)
    total = by_kind[: len(by_kind) // 2].logsumexp(1)
    of_either = torch.cat([total, total])
    inside = (most + kinds[2] - of_either).exp()[:, None]
    row, column = ((edge + (kinds[1] - of_either)[:, None]).exp() for edge in (last_row, above_corner))
    rows = rows * inside + column + corner * row.sum(1, keepdim=True)
    at_end = torch.arange(weights.shape[2], device=weights.device) == (m - 1)[:, None]
    columns = columns * inside + row + at_end * column.sum(1, keepdim=True)
    return by_kind, total, rows, columns


def _reversed(values: Tensor, from_end: Tensor) -> Tensor:
    """[N, size] values read from the end of each; zeros on padding."""
    return values.gather(1, from_end.clamp(min=0)) * (from_end >= 0)


def _end_weights(costs: Costs, n: Tensor, m: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log weight of an end of each kind, [N]."""
    priors = [math.log(prior) if prior > 0 else _NEVER for prior in costs.ends]
    places = (torch.ones_like(n), n + m - 1, n * m)
    stop = (0.0, 0.0, math.log(costs.stop) / 2)
    of_global, overlap, local = (
        prior + once - count.to(scores.dtype).log() / 2 for prior, once, count in zip(priors, stop, places, strict=True)
    )
    return of_global, overlap, local


def _edge(scores: Tensor) -> Tensor:
    """Whether a pair holds the first residue of a sequence, [L, S]."""
    first = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device)
    first[1:, 1:] = False
    return first


def _outside(first: Tensor, last: Tensor) -> Tensor:
    """Of probabilities to be the first, and the last, residue with a partner, that of lying beyond, [N, L]."""
    before = first.flip(1).cumsum(1).flip(1) - first
    return (before + last.cumsum(1) - last).clamp(0.0, 1.0)


def _from_end(lengths: Tensor, size: int) -> Tensor:
    """n - 1 - i, [N, size]; negative on padding."""
    return lengths.long()[:, None] - 1 - torch.arange(size, device=lengths.device)


def _active(rows: Tensor, columns: Tensor) -> Tensor:
    """Where a pair of residues is, of both sides' ``_from_end``, [N, L, S]."""
    return (rows >= 0)[:, :, None] & (columns >= 0)[:, None]


def _turned(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[N, L, S] maps read from the ends of both sequences; anything on padding."""
    if maps.device.type == "cpu":
        return turned_maps(maps, rows, columns)
    rows = rows.clamp(min=0)[:, :, None].expand_as(maps)
    columns = columns.clamp(min=0)[:, None].expand_as(maps)
    return maps.gather(1, rows).gather(2, columns)


def _forward(
    scores: Tensor, n: Tensor, m: Tensor, kinds: tuple[Tensor, Tensor, Tensor], costs: Costs
) -> tuple[Tensor, Tensor]:
    """Log weight of everything up to and including each pair, [N, L, S], and of all that ends with both sequences'
    last residues, [N], where nothing is charged for the kind of that end.

    One antidiagonal i + j = d at a time, both counted from 1: its entries depend on the two before it and not on each
    other. A state is a vector over i = 0..L.
    """
    if scores.device.type == "cpu" and bool(scores.max() <= MOST):
        edge, inner = torch.logaddexp(kinds[1], kinds[2]), kinds[2]
        return forward_weights(scores, n, m, kinds[0], edge, inner, costs.gaps)
    length, size = scores.shape[1:]
    never = scores.new_full((len(scores), length + 1), _NEVER)
    start = torch.cat([kinds[0][:, None], never[:, 1:]], dim=1)
    free = torch.where(_edge(scores), _log_add(kinds[1], kinds[2])[:, None, None], kinds[2][:, None, None])
    both = torch.stack([scores, free], dim=1).flatten(0, 1)
    antidiagonals = _antidiagonals(F.pad(both, (1, 0, 1, 0), value=_NEVER))[1:]
    antidiagonals = antidiagonals.unflatten(1, (-1, 2)).transpose(1, 2).contiguous()
    states = (start, *[never] * 4, start, never)
    weights, ends = _scan(_step(costs.gaps), states, antidiagonals)
    total = ends[n + m - 1, torch.arange(len(n), device=n.device), n]
    pairs = _from_antidiagonals(torch.cat([never[None], weights]), size + 1)[:, 1:, 1:]
    return pairs, total


@lru_cache
def _step(gaps: tuple[Gap, Gap]) -> _Step:
    """From the states at d - 1 (last comes a pair, a query residue alone in a short gap, in a long one, a key residue
    alone likewise, any of them; and any at d - 2) and, at d, scores and weights of free beginnings [2, N, L + 1] to the
    states at d."""

    def alone(ready: Tensor, last: _States) -> _States:
        of_kinds = zip(gaps, last, strict=True)
        return tuple(_log_add(ready - opening, before - extension) for (opening, extension), before in of_kinds)

    def step(states: _States, given: Tensor) -> tuple[_States, tuple[Tensor, Tensor]]:
        pair, query, long_query, key, long_key, last, before = states
        next_pair = given[0] + _log_add(_down(before), given[1])
        after_query, after_key = (_log_add(pair, _log_add(*side)) for side in ((query, long_query), (key, long_key)))
        queries = tuple(_down(state) for state in alone(after_key, (query, long_query)))
        keys = alone(after_query, (key, long_key))
        ends = _log_add(next_pair, _log_add(_log_add(*queries), _log_add(*keys)))
        return (next_pair, *queries, *keys, ends, last), (next_pair, ends)

    return step


def _scan(step: _Step, states: _States, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Both outputs of every step, stacked."""
    if steps.device.type == "xla":  # one loop in the program, where Python's would be unrolled
        from torch_xla.experimental.scan import scan

        return scan(step, states, steps, is_fn_pure=True)[1]
    outputs = []
    for given in steps:
        states, output = step(states, given)
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
