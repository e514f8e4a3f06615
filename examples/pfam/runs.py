"""Gaps as runs: the scores that the pair hidden Markov model is given, and what the aligner takes from it as evidence.

The scores are log odds: the encoder's, BLOSUM62 and those of context profiles, and what residues in their contexts add,
which is learned. The model is trained as a conditional random field: the logarithm of an alignment's probability has a
gradient that needs nothing but the posterior (Do, Gross and Batzoglou, CONTRAlign, RECOMB 2006). Of unrelated pairs the
right alignment is none, whose weight is 1; so the log odds of having an alignment are learned with the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .baselines import GLOBAL_GAP, HALF_BIT
from .pair_hmm import Costs, Posterior, mean_of, of_chance, posterior
from .parts import Part

MODES = ("auto", "global", "local")
"""What is known of an alignment's ends: nothing, that both sequences begin and end together, or that both are free."""


@dataclass(frozen=True)
class Kin:
    """How near relatives are, as one of several pair HMMs sees it.

    Attributes:
        sharpness: its log odds are so many times those that are learned.
        ends: priors of the ends where nothing is known of them; None for those of the costs.
        lenience: nats that it adds to every score.
    """

    sharpness: float = 1.0
    ends: tuple[float, float, float] | None = None
    lenience: float = 0.0


@dataclass(frozen=True)
class Beginning:
    """A pair HMM before anything is learned.

    Attributes:
        costs: of gaps, and the priors of ends of which nothing is known; these stay.
        gain: nats that a half bit of BLOSUM62 counts: less than its 0.35, for it was made of closer relatives.
        offset: nats that are added to every score.
    """

    costs: Costs
    gain: float
    offset: float

    def of_mode(self, mode: str, kin: Kin) -> Costs:
        """The costs where ``mode``, one of ``MODES``, is known of the ends."""
        ends = {"auto": kin.ends or self.costs.ends, "global": (1.0, 0.0, 0.0), "local": (0.0, 0.0, 1.0)}[mode]
        return replace(self.costs, ends=ends)


_AFFINE = Costs(HALF_BIT * GLOBAL_GAP[0], HALF_BIT * GLOBAL_GAP[1], ends=(0.8, 0.1, 0.1), stop=0.01)
BEGINNINGS = {
    "affine": Beginning(_AFFINE, 0.25, 0.0),
    "two-piece": Beginning(replace(_AFFINE, long_opening=8.5, long_extension=0.05), 0.25, 0.0),
    "fitted": Beginning(
        Costs(5.4, 0.9, ends=(0.28, 0.16, 0.56), stop=0.01, long_opening=7.9, long_extension=0.057), 0.245, 0.06
    ),
}
"""By ``--gaps``: Needleman and Wunsch's costs; long gaps beside them; and numbers that make the right partners of
residues likeliest over whole domains, flank tests and unrelated pairs of 35 curated training families."""

RELATIVES = {
    "one": (Kin(),),
    "mixed": (Kin(), Kin(0.87, (0.9, 0.05, 0.05), 0.02), Kin(1.25, (0.4, 0.2, 0.4))),
    "wide": (Kin(), Kin(0.87, (0.98, 0.01, 0.01)), Kin(1.4, (0.1, 0.2, 0.7))),
}
"""By ``--kin``, the pair HMMs whose posteriors are averaged: the first, which is trained and whose log odds are taken,
alone; with one for remote relatives that are alike from end to end, and one for near ones that share a part; and with
two that are further apart. A plan trained on the last trusts it too much."""

START = (3.0, 0.0, 0.0, 2.0, 0.0)
"""Weights of the maps in the evidence before anything is learned: what the pair HMM says is near the truth already."""
MAPS = len(START)
_START_DUSTBIN = (-1.0, 0.0, 0.5, 0.0, 0.0, 0.0)
_LENIENT = 1.5
"""Nats: about the prior odds of having anything to align."""
_WIDTH = 32
_FLOOR = 1e-4


@dataclass(frozen=True)
class RunEvidence:
    """What the pair HMM was given and says.

    Attributes:
        scores: [N, L, S], in nats, with their gradient.
        log_odds: of the pairs to have an alignment, [N]; their gradient with respect to the scores is the posterior.
        posterior: of pairs, ends and flanks.
        query_bin, key_bin: what is added to the dustbin scores, [N, L] and [N, S].
    """

    scores: Tensor
    log_odds: Tensor
    posterior: Posterior
    query_bin: Tensor
    key_bin: Tensor

    def maps(self, part: Part) -> Tensor:
        """Numbers that describe a pair of residues, [pairs, MAPS, rows, S] of a part, or [1, MAPS, 1, entries]."""
        log_p = part.of_maps(self.posterior.log_pairs)
        p, related = log_p.exp(), (part.of_pairs(self.posterior.log_odds) + _LENIENT).sigmoid()
        joint = p * related
        maps = ((joint + _FLOOR).log() / 3, p, log_p.clamp(min=-30) / 10, joint, related.expand_as(p))
        return torch.stack(maps, dim=1)

    @property
    def whole(self) -> tuple[Tensor, Tensor]:
        """Probability that the sequences begin together, and that they end together, [N] each."""
        begin, end = self.posterior.ends[:, :, 0].unbind(1)
        return begin, end


class Runs(nn.Module):
    """From the substitution scores of residues, in BLOSUM62's half bits, and from tokens to evidence.

    ``beginning`` is one of ``BEGINNINGS``, ``kin`` one of ``RELATIVES``.
    """

    def __init__(self, dim: int, beginning: str, kin: str) -> None:
        super().__init__()
        self.beginning = BEGINNINGS[beginning]
        self.kin = RELATIVES[kin]
        self.gain = nn.Parameter(torch.tensor(self.beginning.gain))
        self.offset = nn.Parameter(torch.tensor(self.beginning.offset))
        self.project = nn.Linear(dim, _WIDTH, bias=False)
        # A metric of either sign: what residues in context have in common may also speak against their pair.
        self.metric = nn.Parameter(torch.zeros(_WIDTH))
        self.dustbin = nn.Parameter(torch.tensor(_START_DUSTBIN))

    def forward(
        self, substitution: Tensor, query: Tensor, key: Tensor, lengths: tuple[Tensor, Tensor], mode: str
    ) -> RunEvidence:
        """Of scores [N, L, S], normalised tokens [N, L, d] and [N, S, d], and both lengths [N]; ``mode`` in MODES."""
        odds = self._odds(substitution, query, key, lengths)
        said = [self._posterior(odds, lengths, mode, kin) for kin in self.kin]
        found, scores = mean_of(said), odds + self.offset
        return RunEvidence(
            scores=scores,
            log_odds=_LogOdds.apply(scores, said[0]),
            posterior=found,
            query_bin=_features(found.paired[0], found.query_flank, found.log_odds) @ self.dustbin,
            key_bin=_features(found.paired[1], found.key_flank, found.log_odds) @ self.dustbin,
        )

    def trained(
        self, substitution: Tensor, query: Tensor, key: Tensor, lengths: tuple[Tensor, Tensor], mode: str
    ) -> tuple[Tensor, Tensor]:
        """``scores`` and ``log_odds`` of ``RunEvidence`` alone: what the first of the pair HMMs learns by."""
        odds = self._odds(substitution, query, key, lengths)
        scores = odds + self.offset
        return scores, _LogOdds.apply(scores, self._posterior(odds, lengths, mode, self.kin[0]))

    def _odds(self, substitution: Tensor, query: Tensor, key: Tensor, lengths: tuple[Tensor, Tensor]) -> Tensor:
        """Log odds against these two sequences' own chance, [N, L, S]."""
        context = (self.project(query) * self.metric) @ self.project(key).transpose(1, 2)
        return _against_chance(self.gain * substitution + context, lengths)

    def _posterior(self, odds: Tensor, lengths: tuple[Tensor, Tensor], mode: str, kin: Kin) -> Posterior:
        odds = odds.detach()
        if kin.sharpness != 1:
            odds = _against_chance(kin.sharpness * odds, lengths)
        scores = odds + (self.offset.detach() + kin.lenience)
        return posterior(scores, *lengths, self.beginning.of_mode(mode, kin))


def _against_chance(scores: Tensor, lengths: tuple[Tensor, Tensor]) -> Tensor:
    return scores - of_chance(scores, *lengths)[:, None, None]


class _LogOdds(torch.autograd.Function):
    """The derivative of the sum over all alignments by a score is the probability of its pair."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, found: Posterior) -> Tensor:
        ctx.save_for_backward(found.log_pairs)
        return found.log_odds.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (log_pairs,) = ctx.saved_tensors
        return grad[:, None, None] * log_pairs.exp(), None


def _features(paired: Tensor, flank: Tensor, log_odds: Tensor) -> Tensor:
    """Of each residue, [N, L, 6]: has it a partner, does it lie in a flank or in a gap, is there anything to align."""
    paired = paired.clamp(max=1.0)
    odds = (log_odds + _LENIENT)[:, None].expand_as(flank)
    parts = (
        paired,
        flank,
        (flank + 1e-3).log() / 3,
        (1 - paired).clamp(min=0).add(1e-3).log() / 3,
        odds.sigmoid(),
        F.logsigmoid(odds).clamp(min=-10) / 3,
    )
    return torch.stack(parts, dim=2)
