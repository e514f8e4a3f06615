"""The aligner: residues in context, an optimal-transport attention between the two sequences, and a second look.

Both sequences go through the same network; maps of pairs of residues have a query's and a key's side, so exchanging the
sequences changes a plan a little.

1. Residue embeddings, whose products in a metric of both signs start at BLOSUM62, and dilated convolutions make a token
   per residue; which residues its relatives have is foretold from its neighbours (``profiles``). Both make scores.
2. First attention. Queries and keys are the embeddings and several learned projections of the tokens; the averages of
   these scores along diagonals, a mild preference for the scaled diagonal where the sequences begin and end together,
   and what alignments with affine gap costs and free ends make of the scores (``runs``), are judged entry by entry by
   a small perceptron and added as a float ``attn_mask``. A dustbin score per residue is its gap penalty, which knows
   where the flanks are.
3. Second attention: each token reads what it was aligned with; the same perceptron idea judges the first plan: its
   entries, their averages along diagonals, and where the neighbourhood of either residue landed. Its plan is the
   alignment, or the first plan of another round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_sinkhorn_attn import Dustbin

from .attentions import AttentionProblem
from .config import Config
from .encoder import Encoder, Side
from .encodings import Encodings
from .evidence_kernels import plan_sums
from .layers import ContextBlock, PairScore, compiled
from .parts import Part, Parts
from .runs import MAPS, START, RunEvidence, Runs
from .sampler import Batch

_WIDTHS = (5, 13, 31, 81)
_PLAN_WIDTHS = (5, 15, 61)
_HEAD_DIM = 16
_READ_DIM = 32
_REACH = 12
_WORTH, _UNTHINKABLE = -20.0, -30.0
"""Pairs whose log posterior is below the first are not judged in evaluation: their evidence is the second, less doubt.
Plans change by less than 1e-5, for with the doubt there is next to nothing there."""
_UNIT = 8.0
"""Residues: the distance from where a neighbourhood landed that counts as one."""
# Weights of BLOSUM62 (in half bits) itself and of its averages along diagonals, before anything is learned.
_START = (0.15, 0.3, 0.6, 1.2, 0.6)
_START_DISTANCE = 0.02


@dataclass(frozen=True)
class Doubt:
    """What a pair loses: so much for every nat that its log posterior is below ``start``, and no more from ``end`` on.

    What is left on the hundreds of absurd partners in a long sequence adds up, and moves its barycentre. The crops of
    training do not show that, and training undoes what it can; so evaluation doubts more.
    """

    start: float
    end: float
    per_nat: float

    def __call__(self, log_p: Tensor) -> Tensor:
        return self.per_nat * (self.start - log_p.clamp(min=self.end)).clamp(min=0)


DOUBT_IN_TRAINING, DOUBT = Doubt(-15.0, -35.0, 0.3), Doubt(-7.0, -60.0, 1.0)


@dataclass(frozen=True)
class Scored:
    """What the first attention was asked, kept for the second: queries, keys, evidence [N, L, S], what a part of it was
    judged by, in groups [pairs, C, rows, S] or [1, C, 1, entries], dustbin scores [N, L], [N, S]; and the pairs of
    residues that are judged, in parts."""

    query: Tensor
    key: Tensor
    evidence: Tensor
    maps: Callable[[Part], tuple[Tensor, ...]]
    query_bin: Tensor
    key_bin: Tensor
    runs: RunEvidence | None
    parts: Parts


class Output(NamedTuple):
    """Plans of the first and the last attention, [N, L+1, S+1], the dustbin last; and where gaps are seen as runs, the
    scores [N, L, S] and the log odds [N] of ``RunEvidence``."""

    first: Tensor
    last: Tensor
    scores: Tensor | None = None
    log_odds: Tensor | None = None


class Aligner(nn.Module):
    """Maps a batch of pairs to the plans of the first and the last attention, and more: see ``Output``.

    ``engine`` computes the attentions; None is the first that can. ``mode`` is what is known of the alignments' ends,
    one of ``runs.MODES``. With ``Encodings`` given, sequences are encoded once.

    It begins with the shipped context profiles, if the config wants profiles; with ``loaded``, weights will be loaded
    over what it begins with, and they are not asked for.
    """

    def __init__(self, config: Config, loaded: bool = False) -> None:
        super().__init__()
        self.config = config
        self.engine: str | None = None
        self.mode = "auto"
        dim, heads = config.dim, config.heads
        self.encoder = Encoder(dim, config.dropout, config.profiles == "context")
        if self.encoder.profile is not None and not loaded:
            self.encoder.profile.start()
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, heads * _HEAD_DIM, bias=False)
        # Of the embeddings' inner product, and of each head's: what is learned in context starts at zero.
        self.gain = nn.Parameter(torch.tensor([_START[0], *[0.0] * heads]))
        maps = (1 + heads) * (1 + len(_WIDTHS)) + (MAPS if config.gaps != "single" else 0)
        self.first = PairScore(4 + maps, config.hidden, self._initial_weights(heads)[: 4 + maps])
        self.runs = Runs(dim, config.gaps, config.kin) if config.gaps != "single" else None
        self.dustbin = nn.Linear(dim, 1)
        self.read = nn.Linear(2 * dim + 2, dim)
        nn.init.normal_(self.read.weight, std=0.02)
        self.context_again = ContextBlock(dim, 1, config.dropout)
        self.norm_again = nn.LayerNorm(dim)
        self.project_again = nn.Linear(dim, _READ_DIM, bias=False)
        self.log_reach = nn.Parameter(torch.tensor(1.5))
        self.second = PairScore(12 + len(_PLAN_WIDTHS) + maps, config.hidden)
        self.gap = GapScore(dim)
        nn.init.zeros_(self.dustbin.weight)
        nn.init.zeros_(self.dustbin.bias)

    def forward(self, batch: Batch, known: Encodings | None = None) -> Output:
        scored, solved = self._solve(batch, known)
        runs = (scored.runs.scores, scored.runs.log_odds) if scored.runs else (None, None)
        return Output(solved[0][1], solved[-1][1], *runs)

    def solve(self, batch: Batch) -> list[tuple[AttentionProblem, Tensor]]:
        """The attentions in order, each with its plan [N, L+1, S+1]; each depends on the plan before it.

        The second attention is asked ``train_rounds`` times in training and ``rounds`` times in evaluation, each time
        about the plan of the time before.
        """
        return self._solve(batch)[1]

    def _solve(
        self, batch: Batch, known: Encodings | None = None
    ) -> tuple[Scored, list[tuple[AttentionProblem, Tensor]]]:
        a = self.encoder(batch.query, batch.query_lengths, known)
        b = self.encoder(batch.key, batch.key_lengths, known)
        options = self._options(batch)
        # Scores are differences of large numbers: float32, whatever the layers are computed in.
        with torch.autocast(a.tokens.device.type, enabled=False):
            scored = self._score(a, b)
            asked = (scored.query, scored.key, scored.evidence, scored.query_bin, scored.key_bin)
            solved = [self._solved(*asked, options)]
            for _ in range(self.config.train_rounds if self.training else self.config.rounds):
                solved.append(self._again(a, b, scored, solved[-1][1], options))
        return scored, solved

    def trained_runs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the pair HMM learns by, ``Runs.trained``, without the attentions.

        Raises:
            ValueError: the aligner has none.
        """
        if self.runs is None:
            raise ValueError("an aligner with --gaps single has no pair HMM")
        a = self.encoder(batch.query, batch.query_lengths)
        b = self.encoder(batch.key, batch.key_lengths)
        with torch.autocast(a.tokens.device.type, enabled=False):
            normal = (self.norm(a.tokens), self.norm(b.tokens))
            return self.runs.trained(self.encoder.substitution(a, b), *normal, (a.lengths, b.lengths), self.mode)

    def _score(self, a: Side, b: Side) -> Scored:
        heads = self.config.heads
        a_normal, b_normal = self.norm(a.tokens), self.norm(b.tokens)
        a_heads, b_heads = self.project(a_normal) * a.active, self.project(b_normal) * b.active
        split = (heads, _HEAD_DIM)
        substitution = self.encoder.substitution(a, b)
        runs, doubt, where = None, torch.zeros((), device=substitution.device), None
        if self.runs is not None:
            runs = self.runs(substitution, a_normal, b_normal, (a.lengths, b.lengths), self.mode)
            log_p = runs.posterior.log_pairs
            doubt = (DOUBT_IN_TRAINING if self.training else DOUBT)(log_p)
            if not torch.is_grad_enabled() and not self.training and compiled(log_p):
                where = log_p > _WORTH
        count, length, size = substitution.shape
        parts = Parts.of((count, length, size), where)

        def content(pairs: slice, rows: slice) -> Tensor:
            query, key = a_heads[pairs, rows].unflatten(2, split), b_heads[pairs].unflatten(2, split)
            products = query.transpose(1, 2) @ key.permute(0, 2, 3, 1)
            return torch.cat([substitution[pairs, rows][:, None], products / _HEAD_DIM**0.5], dim=1)

        kept: dict[int, tuple[Tensor, ...]] = {}

        def maps_of(part: Part) -> tuple[Tensor, ...]:
            if part.pairs.start in kept:
                return kept[part.pairs.start]
            of_runs = (runs.maps(part),) if runs else ()
            maps = (*part.averaged(content, _WIDTHS), *self._distances(a, b, runs, part), *of_runs)
            if part.rows == slice(0, length):  # else there is no room for them: they are made again
                kept[part.pairs.start] = maps
            return maps

        def known_maps(part: Part) -> tuple[Tensor, ...]:
            here, means, _, _, *of_runs = maps_of(part)
            return here.detach(), means.detach(), *of_runs

        evidence = parts.judged(lambda part: self.first(*maps_of(part)), substitution, _UNTHINKABLE) - doubt
        gain = torch.cat([self.gain[:1].expand(a.embedded.shape[2]), self.gain[1:].repeat_interleave(_HEAD_DIM)])
        return Scored(
            query=torch.cat([a.embedded * self.encoder.metric, a_heads / _HEAD_DIM**0.5], dim=2) * gain,
            key=torch.cat([b.embedded, b_heads], dim=2),
            evidence=evidence,
            maps=known_maps,
            query_bin=self.dustbin(a_normal)[..., 0] + (runs.query_bin if runs else 0.0),
            key_bin=self.dustbin(b_normal)[..., 0] + (runs.key_bin if runs else 0.0),
            runs=runs,
            parts=parts,
        )

    def _distances(self, a: Side, b: Side, runs: RunEvidence | None, part: Part) -> tuple[Tensor, Tensor]:
        """Distances from three diagonals, [pairs, 3, rows, S], and the square of the relative one, [pairs, 1, rows, S],
        or [1, ., 1, entries].

        They count as far as the sequences begin, or end, together.
        """
        n, m = (part.of_pairs(side.lengths) for side in (a, b))
        i, j = part.of_rows(a.everywhere), part.of_columns(b.everywhere)
        scaled = j - part.of_rows(a.centres_on(b))
        relative = (4 * scaled / (n + m)).square()
        # A single long insertion leaves everything before it in line with the starts, and after it with the ends.
        from_start = j - i
        from_end = from_start - (m - n)
        begin, end = map(part.of_pairs, runs.whole) if runs else (1.0, 1.0)
        known = ((scaled, begin * end), (from_start, begin), (from_end, end))
        apart = torch.stack([distance.abs().clamp(max=100) * weight for distance, weight in known], dim=1)
        return 0.03 * apart, (relative * begin * end)[:, None]

    def _again(
        self, a: Side, b: Side, scored: Scored, whole: Tensor, options: dict[str, Any]
    ) -> tuple[AttentionProblem, Tensor]:
        """The second attention about a plan with its dustbin, [N, L+1, S+1]."""
        plan, of_rows, of_columns = whole[:, :-1, :-1], *_sums(whole)
        to_a, to_b = of_rows[..., :2], of_columns[..., :2]
        a_tokens, b_tokens = self._reread(a, b, plan, to_a), self._reread(b, a, plan.mT, to_b)
        query, key = (
            self.project_again(self.norm_again(tokens)) * (side.active * _READ_DIM**-0.25)
            for tokens, side in ((a_tokens, a), (b_tokens, b))
        )
        on_key, on_query = self._land(a, b, plan, to_a), self._land(b, a, plan.mT, to_b)
        known = plan.detach()
        (mass_of_row, _, best), (mass_of_column, _, most) = (of.detach().unbind(2) for of in (of_rows, of_columns))

        def more_evidence(part: Part) -> Tensor:
            to_key = (part.of_columns(b.everywhere) - part.of_rows(on_key)) / _UNIT
            to_query = (part.of_rows(a.everywhere) - part.of_columns(on_query)) / _UNIT
            maps, means = part.averaged(lambda pairs, rows: known[pairs, rows][:, None], _PLAN_WIDTHS)
            here = maps[:, 0]
            judged = [
                (here + 1e-4).log() / 3,
                here,
                here - part.of_rows(best),
                here - part.of_columns(most),
                to_key.abs().clamp(max=6) / 2,
                to_query.abs().clamp(max=6) / 2,
                (-to_key.square()).exp(),
                (-to_query.square()).exp(),
                part.of_rows(mass_of_row).expand_as(here),
                part.of_columns(mass_of_column).expand_as(here),
                part.products(query, key),
                (means + 1e-3).log().mean(dim=1) / 3,
            ]
            return self.second(torch.stack(judged, dim=1), means, *scored.maps(part))

        return self._solved(
            torch.cat([scored.query, query], dim=2),
            torch.cat([scored.key, key], dim=2),
            scored.evidence + scored.parts.judged(more_evidence, known, 0.0),
            scored.query_bin + self.gap(to_a, a.tokens, a.active),
            scored.key_bin + self.gap(to_b, b.tokens, b.active),
            options,
        )

    def _solved(
        self, query: Tensor, key: Tensor, mask: Tensor, query_bin: Tensor, key_bin: Tensor, options: dict[str, Any]
    ) -> tuple[AttentionProblem, Tensor]:
        capacity = 1.0 if self.config.capacity == "one" else None
        dustbin = Dustbin(query_bin[:, None], key_bin[:, None], row_capacity=capacity, col_capacity=capacity)
        options = {**options, "dustbin": dustbin}
        problem = AttentionProblem(query[:, None], key[:, None], mask[:, None], options, self.config.attention)
        return problem, problem.plan()

    def _options(self, batch: Batch) -> dict[str, Any]:
        config = self.config
        options: dict[str, Any] = {
            "scale": 1.0,
            "base_iters": config.base_iters,
            "tail_iters": config.tail_iters,
            "gradient": config.gradient,
            "relaxation": config.relaxation,
            "engine": self.engine,
            "query_lengths": batch.query_lengths,
            "key_lengths": batch.key_lengths,
        }
        if config.window is not None:
            options["window"] = (config.window, config.window)
        if config.capacity == "one":
            # The dustbin takes one residue's mass a side, so real columns must share what real rows have: n/m each.
            share = (batch.query_lengths / batch.key_lengths)[:, None, None]
            options["row_mass"] = torch.ones_like(batch.query, dtype=share.dtype)[:, None]
            options["col_mass"] = share.expand(-1, 1, batch.key.shape[1])
        return options

    def _reread(self, side: Side, other: Side, plan: Tensor, certainty: Tensor) -> Tensor:
        """Tokens after reading, through the plan [N, L, S], the tokens they were aligned with, [N, L, d]."""
        read = self.read(torch.cat([side.tokens, plan @ other.tokens, certainty], dim=-1))
        return self.context_again(side.tokens + read, side.active)

    def _land(self, side: Side, other: Side, plan: Tensor, certainty: Tensor) -> Tensor:
        """Where the neighbourhood of each residue lands on the other sequence, [N, L].

        Displacements from the scaled diagonal, averaged over neighbours with weights that fall off with the distance
        and rise with the sharpness of the neighbour's row.
        """
        centre = side.centres_on(other)
        mass, sharpness = certainty.unbind(2)
        barycentre = (plan @ other.positions) / (mass + 1e-6)
        weight = (sharpness + 1e-4) * side.active[..., 0]
        offsets = torch.arange(-_REACH, _REACH + 1, dtype=plan.dtype, device=plan.device)
        kernel = torch.exp(-offsets.abs() / self.log_reach.exp())[None, None]
        total = F.conv1d(((barycentre - centre) * weight)[:, None], kernel, padding=_REACH)
        return centre + (total / (F.conv1d(weight[:, None], kernel, padding=_REACH) + 1e-6))[:, 0]

    @staticmethod
    def _initial_weights(heads: int) -> tuple[float, ...]:
        """Of the maps in the first evidence: averages of BLOSUM62, the distance from the scaled diagonal, the runs."""
        of_maps = [0.0] * (1 + heads)  # what is not averaged is in queries and keys
        for weight in _START[1:]:
            of_maps += [weight, *[0.0] * heads]
        return (*of_maps, -_START_DISTANCE, 0.0, 0.0, 0.0, *START)


class GapScore(nn.Module):
    """What mass and sharpness of rows [N, L, 2] add to their dustbin scores, [N, L]: gaps come in runs, so neighbours
    count."""

    def __init__(self, dim: int, channels: int = 16, width: int = 9) -> None:
        super().__init__()
        self.reduce = nn.Linear(dim, 8)
        self.gather = nn.Conv1d(10, channels, width, padding=width // 2)
        self.score = nn.Parameter(torch.zeros(channels))

    def forward(self, certainty: Tensor, tokens: Tensor, active: Tensor) -> Tensor:
        known = torch.cat([certainty, self.reduce(tokens)], dim=2) * active
        return self.score @ F.gelu(self.gather(known.transpose(1, 2)))


def _sums(whole: Tensor) -> tuple[Tensor, Tensor]:
    """Mass, sharpness (sum_j P_ij^2) and largest entry of each row of a plan [N, L+1, S+1] but its dustbin, [N, L, 3],
    and of each column, [N, S, 3]."""
    if compiled(whole) and not torch.is_grad_enabled():
        return plan_sums(whole)
    plan = whole[:, :-1, :-1]
    squares = plan.square()
    rows, columns = (torch.stack([plan.sum(dim), squares.sum(dim), plan.amax(dim)], dim=2) for dim in (2, 1))
    return rows, columns
